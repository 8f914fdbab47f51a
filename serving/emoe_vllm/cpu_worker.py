"""The worker on a CPU: apart from the other, as its base needs what only vLLM's CPU build has."""

from vllm.v1.worker.cpu_worker import CPUWorker  # before other workers: it says so itself

from emoe_vllm.worker import ElasticWorker


class ElasticCPUWorker(ElasticWorker, CPUWorker):
    """vLLM's worker on a CPU that tells the layers each token's budget."""

"""Converting a checkpoint against copying it: run by bench.py, writes JSON.

    python benchmarks/measure_conversion.py RESULT.json --folder /tmp --repeats 5 --layers 4

Makes a Hugging Face folder of random bfloat16 weights with OLMoE's widths in a temporary folder, then measures in turn:
copying its bytes to the same disk, and importing it; likewise for the export of what was imported. Everything is on
the disk (fsync) before the clock stops. Before each measurement the source is dropped from the page cache. Each
conversion is a process of its own, whose largest resident memory is read when it ends; the time of the conversion
itself and that of the whole process, with the start of Python and its libraries, are kept apart.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
COPIES = 4  # the source, what was imported, and one more of either while it is measured; some air


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("result", type=Path, help="JSON file to write.")
    options.add_argument("--folder", type=Path, default=tempfile.gettempdir(), help="Where to make the checkpoints.")
    options.add_argument("--repeats", type=int, default=5, help="Pairs of copy and conversion, in each direction.")
    options.add_argument("--layers", type=int, default=4, help="Layers of OLMoE's widths, 0.84 GB each.")
    options.add_argument("--width", type=int, default=2048, help="Hidden size; OLMoE's by default.")
    options.add_argument("--convert", nargs=3, metavar=("KIND", "FROM", "TO"), help="(One conversion, for itself.)")
    chosen = options.parse_args()
    if chosen.convert:
        result = convert(*chosen.convert)
    else:
        with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="measure-conversion-") as folder:
            result = measure(Path(folder), chosen.layers, chosen.width, chosen.repeats)
    chosen.result.write_text(json.dumps(result))


def measure(folder: Path, layers: int, width: int, repeats: int) -> dict:
    """Bytes, and for each direction the seconds and peaks of every repeat."""
    groups = groups_of(layers, width, folder / "hf")
    sizes = {name: sum(2 * product(shape) for shape in tensors.values()) for name, tensors in groups.items()}
    check_space(folder, sum(sizes.values()))
    write_weights(groups, folder / "hf")
    run("import", folder / "hf", folder / "megatron", folder)
    result = {"bytes": sum(sizes.values()), "group_bytes": max(sizes.values())}
    for kind, source in (("import", folder / "hf"), ("export", folder / "megatron")):
        result[kind] = [pair(kind, source, folder) for _ in range(repeats)]
    return result


def check_space(folder: Path, size: int) -> None:
    """SystemExit where the disk cannot hold all copies."""
    needed, free = COPIES * size, shutil.disk_usage(folder).free
    if free < needed:
        sys.exit(f"--folder {folder.parent}: {needed / 1e9:.0f} GB are needed, {free / 1e9:.0f} GB are free")


def groups_of(layers: int, width: int, folder: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """Write config.json; names and shapes of all tensors, by group (embedding, layers, head)."""
    from transformers import OlmoeConfig

    from megatron_emoe.hf.registry import architecture_of

    config = OlmoeConfig(hidden_size=width, intermediate_size=1024, num_hidden_layers=layers, dtype="bfloat16")
    config.architectures = ["OlmoeForCausalLM"]
    config.save_pretrained(folder)
    return {group.name: group.hf_tensors() for group in architecture_of(config).groups(config)}


def write_weights(groups: dict[str, dict[str, tuple[int, ...]]], folder: Path) -> None:
    """A safetensors file for each group: random bits of numbers in [0, 1)."""
    import torch

    from megatron_emoe.hf.safetensors_files import write_index, write_shard

    ones = 0x3F80  # the bits of 1.0
    shards = {}
    for number, tensors in enumerate(groups.values()):
        bits = {name: torch.empty(shape, dtype=torch.int16).random_(ones) for name, shape in tensors.items()}
        file = f"model-{number:05}.safetensors"
        write_shard({name: tensor.view(torch.bfloat16) for name, tensor in bits.items()}, folder / file)
        shards[file] = {name: tensor.nbytes for name, tensor in bits.items()}
    write_index(shards, folder)


def product(shape: tuple[int, ...]) -> int:
    number = 1
    for length in shape:
        number *= length
    return number


def pair(kind: str, source: Path, folder: Path) -> dict[str, float]:
    """One copy and one conversion, each from a source that is on the disk alone. Their output is deleted."""
    drop_from_cache(source)
    start = time.perf_counter()
    copy(source, folder / "copy")
    seconds = time.perf_counter() - start
    remove(folder / "copy")
    drop_from_cache(source)
    converted = run(kind, source, folder / "out", folder)
    remove(folder / "out")
    return {"copy": seconds, **converted}


def run(kind: str, source: Path, out: Path, folder: Path) -> dict[str, float]:
    """Convert in a process of its own: seconds of the conversion and of the process, its largest resident memory."""
    result = folder / "result.json"
    command = [sys.executable, __file__, str(result), "--convert", kind, str(source), str(out)]
    python_path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    start = time.perf_counter()
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": python_path}, capture_output=True, text=True)
    wall = time.perf_counter() - start
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return {**json.loads(result.read_text()), "process": wall}


def convert(kind: str, source: str, out: str) -> dict[str, float]:
    """Import or export, without a check of the result, as tools/convert_checkpoint.py does."""
    from megatron_emoe.host import mode as host_mode

    host_mode.enable(force=True)
    from megatron_emoe.hf.export_model import export_model
    from megatron_emoe.hf.import_model import import_model

    work = {"import": import_model, "export": export_model}[kind]
    start = time.perf_counter()
    work(Path(source), Path(out), report=lambda line: None)
    sync(Path(out))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def copy(source: Path, out: Path) -> None:
    """Copy a folder file by file, each brought to the disk."""
    shutil.copytree(source, out)
    sync(out)


def sync(folder: Path) -> None:
    for file in files(folder):
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())


def drop_from_cache(folder: Path) -> None:
    """Make the next reader of these files fetch them from the disk."""
    sync(folder)
    for file in files(folder):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remove(folder: Path) -> None:
    """Delete, and let the disk come to rest."""
    shutil.rmtree(folder)
    os.sync()


def files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


if __name__ == "__main__":
    main()

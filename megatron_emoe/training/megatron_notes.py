"""What docs/flags.md says of Megatron's flags that are served: the rest of the declaration in megatron_flags.py.

Read by tools/flags_page.py and tests alone. A * stands for any rest of a name.
"""

ELASTIC = {
    "--num-experts": "required",
    "--moe-router-topk": "k: what schedules draw around; on the command line it wins over the stored one",
    "--use-checkpoint-args": "a --moe-router-topk on the command line wins over the stored one",
    "--moe-router-load-balancing-type": "under a drawn k: docs/method.md",
    "--moe-aux-loss-coeff": "under a drawn k: docs/method.md",
    "--moe-router-enable-expert-bias": "with softmax scores too, which the core refuses",
    "--seed": "not that of elastic draws, which is --emoe-seed",
    "--load": "the newest whole checkpoint in it; elastic settings must be the stored ones (docs/reliability.md)",
    "--finetune": "elastic settings may change, and what changed is said",
    "--save": "a folder with another run's checkpoints is refused (docs/reliability.md)",
    "--verify-integrity": "where bits flipped, the checkpoint before is used (docs/reliability.md)",
    "--exit-signal-handler": "SIGTERM and SIGUSR1, from the first moment on (docs/reliability.md)",
    "--exit-signal-handler-for-training": "ends without saving; not with --exit-signal-handler",
    "--exit-duration-in-mins": "an evaluation ends within it too",
    "--eval-iters": "the same batches again at each --emoe-eval-k",
    "--eval-interval": "the same batches again at each --emoe-eval-k; unset: no evaluation in training",
    "--multiple-validation-sets": "not with --emoe-eval-k",
    "--log-throughput": "FLOPs at the expected k, or the measured mean",
    "--tensorboard-dir": "the elastic metrics as well",
    "--rampup-batch-size": "as a --step-batch-size-schedule (the core does not read it); needs --train-samples",
    "--step-batch-size-schedule": "checked before the start; needs --train-samples",
    "--check-for-spiky-loss": "a loss ten times the largest of the first hundred is computed again",
    "--profile": "ranges of route, dispatch, experts, combine, losses as well (docs/performance.md)",
    "--qk-layernorm": "what it norms: --emoe-qk-norm",
    "--sft": "chats of preprocess_data.py --chat, packed, on local layers too; or JSONL as in Megatron (docs/sft.md)",
    "--dataloader-inter-document-masking": "on local layers too, by a mask",
}
"""Flags whose meaning elastic training changes or adds to -> how. All else about them is as in Megatron."""

REFUSED_TOGETHER = {
    "--moe-router-load-balancing-type": "sinkhorn, quantile_balancing: with drawn experts or k; global_aux_loss: with "
    "--emoe-k-draw microbatch; all but aux_loss: with top-p, null-experts",
    "--micro-batch-size": "above 1: with --sft or --dataloader-inter-document-masking and pipeline stages",
    "--window-size": "with --sft or --dataloader-inter-document-masking on local layers",
    "--dataloader-fast-cache-load": "with --sft",
    "--moe-router-fusion": "with top-p, null-experts, noisy-topk",
    "--moe-enable-routing-replay": "with drawn experts or k",
    "--cuda-graph-impl": "with drawn experts or k; a captured router also with what records routing",
    "--cuda-graph-modules": "a captured router: with what records routing",
    "--transformer-impl": "inference_optimized: with drawn experts or k, --emoe-qk-norm, --emoe-clip-qkv",
    "--moe-token-dispatcher-type": "flex: with top-p, null-experts; with a drawn k as its backend can",
    "--moe-flex-dispatcher-backend": "ncclep: with a drawn k; deepep: with more than 32 experts per token",
    "--moe-paged-stash": "with a drawn k",
    "--moe-apply-probs-on-input": "with a drawn k, and any k above 1",
    "--moe-router-padding-for-quantization": "with --moe-pad-expert-input-to-capacity, or deepep at a drawn k",
    "--moe-pad-expert-input-to-capacity": "with --moe-router-padding-for-quantization",
    "--moe-router-score-function": "not softmax: with top-p, null-experts, noisy-topk",
    "--moe-router-enable-expert-bias": "with top-p, null-experts, noisy-topk",
    "--moe-router-group-topk": "with top-p, null-experts, noisy-topk",
    "--moe-expert-capacity-factor": "with top-p, null-experts",
    "--te-rng-tracker": "with drawn experts or k",
    "--fp8-format": "with --transformer-impl local",
    "--fp4-format": "with --transformer-impl local",
    "--fp8-recipe": "delayed: with --save, where Transformer Engine would not load its scales again",
    "--pipeline-model-parallel-size": "with --emoe-distill-coeff, --emoe-teacher, --emoe-second-pass",
    "--mtp-num-layers": "with --emoe-distill-coeff, --emoe-teacher, --emoe-second-pass",
    "--multi-latent-attention": "with --emoe-clip-qkv, --emoe-qk-norm full",
    "--q-lora-rank": "with --emoe-qk-norm latent",
    "--normalization": "not RMSNorm: with --emoe-qk-norm full",
    "--apply-layernorm-1p": "with --emoe-qk-norm full",
    "--qk-layernorm": "local layers without compressed queries under --multi-latent-attention: --emoe-qk-norm latent",
    "--qk-l2-norm": "with --emoe-qk-norm full or latent, --emoe-clip-qkv",
    "--experimental-attention-variant": "with --emoe-qk-norm full or latent, --emoe-clip-qkv",
    "--mla-down-proj-fusion": "with --emoe-qk-norm latent",
    "--expert-tensor-parallel-size": "deepep: with more than 32 experts per token times it",
}
"""Flags that our rules refuse together with others, and with which; the run says it by both flags."""

ONLY_WITH = {
    "--multi-latent-attention": "--q-lora-rank --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim"
    " --rotary-scaling-factor --mscale --mscale-all-dim --mla-down-proj-fusion --rope-type",
    "--experimental-attention-variant, Transformer Engine": "--dsa-* --no-dsa-* --linear-*",
    "Transformer Engine": "--experimental-attention-variant --moe-latent-size --apply-layernorm-1p"
    " --use-te-activation-func --use-transformer-engine-op-fuser --fused-residual-rmsnorm --te-precision-config-file"
    " --symmetric-ar-type --overlap-dispatch-backward-with-experts-wgrad --use-precision-aware-optimizer",
    "--use-mup": "--mup-*",
    "--position-embedding-type yarn": "--yarn-* --no-yarn-*",
    "--use-rope-scaling": "--rope-scaling-factor",
    "--window-size": "--window-attn-skip-freq",
    "--qk-clip": "--qk-clip-*",
    "--fp8-format": "--fp8-* --no-fp8-wgrad --first-last-layers-bf16 --fp8-param-gather"
    " --reuse-grad-buf-for-mxfp8-param-ag",
    "--first-last-layers-bf16": "--num-layers-at-*",
    "--fp4-format": "--fp4-*",
    "--moe-token-dispatcher-type flex": "--moe-enable-deepep --moe-flex-* --moe-deepep-* --moe-hybridep-*"
    " --moe-ncclep-* --moe-permute-fusion-into-hybridep --moe-expert-rank-capacity-factor",
    "--moe-paged-stash": "--moe-paged-stash-*",
    "--moe-expert-capacity-factor": "--moe-pad-expert-input-to-capacity --moe-token-drop-policy",
    "--moe-shared-expert-intermediate-size": "--moe-shared-expert-* --use-grouped-gemm-for-shared-expert",
    "--moe-grouped-gemm": "--moe-single-grouped-*",
    "--moe-router-num-groups": "--moe-router-group-topk",
    "--mtp-num-layers": "--mtp-*",
    "--tp-comm-overlap": "--tp-comm-* --no-tp-comm-* --disable-tp-comm-*",
    "--defer-embedding-wgrad-compute": "--wgrad-deferral-limit",
    "--cpu-offloading-num-layers": "--cpu-offloading-*",
    "--fine-grained-activation-offloading": "--offload-modules --min-offloaded-tensor-size"
    " --delay-offload-until-cuda-graph --delta-offload-bytes-across-pp-ranks --activation-offload-fraction"
    " --fine-grained-offloading-max-inflight-offloads",
    "--recompute-granularity": "--recompute-method --recompute-num-layers --recompute-modules"
    " --distribute-saved-activations",
    "--cuda-graph-impl": "--cuda-graph-modules --cuda-graph-scope --cuda-graph-warmup-steps --optimizer-cuda-graph",
    "--optimizer muon, and the package emerging_optimizers": "--muon-*",
    "--optimizer lion, and the package emerging_optimizers": "--lion-*",
    "--optimizer sgd": "--sgd-momentum",
    "--optimizer-cpu-offload": "--optimizer-offload-fraction --use-torch-optimizer-for-cpu-offload"
    " --overlap-cpu-optimizer-d2h-h2d --no-pin-cpu-*",
    "--save": "--save-params-interval --save-wgrads-interval",
    "--save, and the layers of Transformer Engine": "--save-activations-interval --save-dgrads-interval",
    "--use-precision-aware-optimizer": "--main-grads-dtype --main-params-dtype --exp-avg-dtype --exp-avg-sq-dtype",
    "--use-distributed-optimizer": "--overlap-param-gather --overlap-param-gather-with-optimizer-step",
    "--use-megatron-fsdp": "--megatron-fsdp-* --fsdp-* --data-parallel-sharding-strategy --outer-dp-sharding-strategy"
    " --no-gradient-reduce-div-fusion --keep-fp8-transpose-cache"
    " --suggested-communication-unit-size --no-strict-fsdp-dtensor-load --disable-strict-fsdp-dtensor-load",
    "--use-torch-fsdp2": "--torch-fsdp2-*",
    "--fp16": "--loss-scale --initial-loss-scale --min-loss-scale --loss-scale-window --hysteresis",
    "--lr-decay-style WSD": "--lr-wsd-*",
    "--async-save": "--async-* --use-persistent-ckpt-worker",
    "--non-persistent-save-interval": "--non-persistent-ckpt-type --non-persistent-global-ckpt-dir",
    "--non-persistent-ckpt-type local, and the package nvidia_resiliency_ext": "--non-persistent-local-* --replication"
    " --replication-*",
    "--ckpt-convert-format": "--ckpt-convert-*",
    "--train-samples": "--lr-decay-samples --lr-warmup-samples --lr-wsd-decay-samples --phase-transition-iterations"
    " --rampup-batch-size --step-batch-size-schedule",
    "--profile": "--profile-* --use-pytorch-profiler --pytorch-profiler-* --nvtx-ranges --record-shapes",
    "--record-memory-history": "--memory-snapshot-path",
    "--wandb-project, and the package wandb": "--wandb-exp-name --wandb-save-dir --wandb-entity",
    "--log-straggler": "--straggler-* --disable-straggler-on-startup",
    "--moe-routing-trace-path": "--moe-routing-trace-*",
    "the package nvidia_resiliency_ext": "--enable-ft-package --fault-injector-ranks --fault-injector-num-ranks",
    "--enable-ft-package": "--calc-ft-timeouts --ft-num-warmup-iters",
    "the package multistorageclient": "--enable-msc",
    "the package workload_inspector": "--run-workload-inspector-server",
    "the package one_logger, else nothing is sent": "--one-logger-* --app-tag-*",
    "--fault-injector-ranks or --fault-injector-num-ranks": "--fault-injector-*",
    "--sft": "--sft-tokenizer-prompt-format",
    "--manual-gc": "--manual-gc-interval --no-manual-gc-eval --disable-manual-gc-eval",
    "--dataloader-type cyclic": "--no-data-sharding",
    "--tokenizer-type TikTokenizer": "--tiktoken-*",
    "--tokenizer-type SentencePieceTokenizer": "--tokenizer-sentencepiece-* --no-tokenizer-sentencepiece-*",
    "--tokenizer-type HuggingFaceTokenizer": "--tokenizer-hf-* --trust-remote-code",
    "--tokenizer-type NullTokenizer": "--null-tokenizer-*",
    "--flight-recorder-dump-path": "--flight-recorder-* --no-flight-recorder-* --disable-flight-recorder-*",
    "--context-parallel-size above 1": "--cp-comm-type",
    "--cp-comm-type a2a+p2p, and the package einops": "--hierarchical-context-parallel-sizes",
    "--use-sharp": "--sharp-enabled-group",
    "--error-injection-rate": "--error-injection-type",
}
"""What flags have no effect without -> these flags, but those that the first text names."""

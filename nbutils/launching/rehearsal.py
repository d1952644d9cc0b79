"""Let Accelerate run real FSDP on processes that have no accelerator.

Run as: `accelerate launch --config_file CONFIG -m nbutils.launching.rehearsal SCRIPT.py ...`

The training script knows nothing of this. On a CPU, Accelerate reads `distributed_type: FSDP` from the
file and then trains with plain DDP, without a word. `enable()` removes what stands in the way of FSDP there, and what
spoils what a run computes or saves:

1. `AcceleratorState` sets the type to FSDP for accelerator backends only. We set it for gloo on CPU too.
2. Its device is `cpu:0`; FSDP 1 insists on `cpu`, without a number.
3. `FullyShardedDataParallelPlugin` refuses `sync_module_states` without an accelerator, and FSDP 1 refuses
   to offload from CPU to CPU: the rehearsal configs leave both off.
4. On CPUs with AVX512-BF16, bitsandbytes repacks the 4-bit weights in place at the first evaluation. Under FSDP the
   packed bytes then meet code that expects the usual order, and every later loss is wrong.
5. Accelerate asks FSDP 1 for a full state dict moved to the CPU. From CPU to CPU nothing is copied, and FSDP frees
   what it believes it has copied: `setStorage: ... out of bounds for storage of size 0`.
6. On a CPU, transformers leaves `ddp_timeout` out when it makes the process group, and a rank would wait half an hour
   for one that is gone.
7. FSDP 1 takes the number of devices for the ranks of a machine when it makes the groups of HYBRID_SHARD, and torch
   counts one CPU. Here a machine counts as many devices as it has ranks, as one with GPUs does
   (nbutils.planning.hybrid_shard).

A tiny launch is mostly imports. Three things make them and the end of the process shorter; what each one saves stands
in docs/speed_log.md: less garbage collection, an end without the interpreter's own, and bitsandbytes without torch's
compiler.
"""

import atexit
import gc
import os
import runpy
import sys
import threading
from pathlib import Path
from typing import NoReturn


def enable() -> None:
    """Patch Accelerate and bitsandbytes in this process so that FSDP runs on CPU.

    Call it before anything creates an `Accelerator` or loads a 4-bit model.

    Raises:
        RuntimeError: an accelerator is visible. Use the real configuration there.
    """
    import torch

    if torch.cuda.is_available():
        raise RuntimeError(
            "This machine has a CUDA device, and the rehearsal is for machines without one. "
            "Launch with configs/accelerate/config_fsdp.yaml instead, or hide the GPUs with CUDA_VISIBLE_DEVICES=''."
        )
    os.environ["ACCELERATE_USE_CPU"] = "true"  # read by TrainingArguments and AcceleratorState
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # 2: `cpu`, not `cpu:0`
    _import_bitsandbytes_without_the_compiler()
    _join_the_gloo_group_by_default()
    _let_accelerate_choose_fsdp()
    _count_a_device_for_each_rank()
    keep_four_bit_weights_in_order()
    _keep_gathered_weights_while_they_are_saved()


def _import_bitsandbytes_without_the_compiler() -> None:
    """Importing it hands four functions to torch.compile, which loads the whole compiler.

    On a CPU other kernels stand in for them, odd shapes apart. What the script compiles itself is compiled:
    torch.compile is back when this returns.
    """
    import torch

    compile_ = torch.compile
    torch.compile = lambda function=None, **_: function or (lambda decorated: decorated)
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compile_


def _join_the_gloo_group_by_default() -> None:
    from accelerate import PartialState
    from transformers import TrainingArguments

    plain_init, plain_post_init = PartialState.__init__, TrainingArguments.__post_init__
    asked = {}

    def post_init(self):  # which makes the process group
        asked["timeout"] = self.ddp_timeout_delta
        plain_post_init(self)

    def init(self, cpu=True, **kwargs):
        plain_init(self, cpu=True, **{**asked, **kwargs})

    TrainingArguments.__post_init__, PartialState.__init__ = post_init, init


def _let_accelerate_choose_fsdp() -> None:
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    plain_init = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        plain_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def _count_a_device_for_each_rank() -> None:
    import torch

    torch.cpu.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def keep_four_bit_weights_in_order() -> None:
    """Stop bitsandbytes from repacking 4-bit weights for CPUs with AVX512-BF16; call it before a model is loaded."""
    import bitsandbytes.nn.modules as modules

    modules.has_avx512bf16 = lambda: False


def _keep_gathered_weights_while_they_are_saved() -> None:
    import contextlib

    from torch.distributed.fsdp._flat_param import FlatParamHandle

    FlatParamHandle.to_cpu = lambda handle: contextlib.nullcontext()


def main() -> None:
    """Enable the rehearsal, then run the script named on the command line as `__main__`."""
    if len(sys.argv) < 2:
        raise SystemExit(
            "nbutils.launching.rehearsal: name the script to run: -m nbutils.launching.rehearsal SCRIPT.py [arguments]"
        )
    # Imports make objects that stay, and by default the collector looks through them over and over.
    gc.set_threshold(100_000)
    enable()
    gc.freeze()  # the Trainer collects all once; what is imported by now stays and is left out
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
    end_here()


def end_here() -> NoReturn:
    """End a rank that has done its work, and leave out the interpreter's own end.

    That takes a second or two, to look through all objects for nothing, and was seen to abort now and then: a thread of
    a library outlives what it belongs to (`terminate called without an active exception`).
    """
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    # Waits for threads, after it has told those of an executor to end: torch.compile leaves one that waits for work.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

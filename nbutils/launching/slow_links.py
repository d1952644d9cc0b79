"""Slow links, made on a machine with fast ones: each transfer of FSDP waits as long as it would take on a slower link.

`nbutils.launching.measured_run` switches it on with NBUTILS_LINK_GBS=0,25,12,6 and NBUTILS_LINK_STEPS=4: four steps as
the machine is, then four on a link of 25 GB/s, and so on. Nothing that is computed changes.

What a rank receives comes over one link, as on a card without peer access: its own shard from host memory and the
others' shards through it. So the delays of copies and gathers come one after the other. What it sends (activations that
wait on the host) goes the other way at the same time.
"""

import functools
import time

import torch
from torch.distributed.fsdp import _flat_param
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param

GIB = 2**30


class SlowLink:
    """One direction of a rank's link, on which transfers wait for each other.

    Args:
        real_gbs: GB/s of the machine's own link; a transfer has taken that time already.
    """

    def __init__(self, real_gbs: float):
        self.real_gbs, self.gbs, self.bytes = real_gbs, 0.0, 0
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def carry(self, size: int) -> None:
        """Let the current stream wait as long as `size` bytes take longer here than on the real link.

        Args:
            size: bytes.
        """
        self.bytes += size
        if not self.gbs:
            return
        seconds = size / (self.gbs * 1e9) - (size / (self.real_gbs * 1e9) if self.real_gbs else 0.0)
        if seconds <= 0:
            return
        if self.stream is None:  # a rehearsal on the CPU has no streams
            time.sleep(seconds)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(int(seconds * cycles_a_second()))
        torch.cuda.current_stream().wait_stream(self.stream)


class SlowLinks:
    """Both directions of a rank's link, and the speeds that they take step after step.

    Args:
        speeds: GB/s; 0 is the machine as it is.
        steps: optimizer steps at each speed.
    """

    def __init__(self, speeds: list[float], steps: int):
        self.speeds, self.steps = speeds, steps
        real = host_copy_gbs() if torch.cuda.is_available() else 0.0
        self.incoming, self.outgoing = SlowLink(real), SlowLink(real)
        self.at_step(0)

    def at_step(self, step: int) -> None:
        """Take the speed for the step after this one.

        Args:
            step: optimizer steps that are done.
        """
        place = min(step // self.steps, len(self.speeds) - 1)
        self.incoming.gbs = self.outgoing.gbs = self.speeds[place]

    def stand_in_the_way(self) -> None:
        """Stand around the copies and gathers of FSDP 1 and FSDP 2, and around activations that wait on the host."""
        self._fsdp1()
        self._fsdp2()
        if torch.cuda.is_available():
            self._activations()

    def _fsdp1(self) -> None:
        handle = _flat_param.FlatParamHandle
        plain_to, plain_gather = handle.flat_param_to, handle._all_gather_flat_param

        @functools.wraps(plain_to)
        def flat_param_to(this, *args, **kwargs):
            was_on_host = this.flat_param.device.type == "cpu"
            plain_to(this, *args, **kwargs)
            if was_on_host and this.flat_param.is_cuda:
                self.incoming.carry(_size(this.flat_param))

        @functools.wraps(plain_gather)
        def all_gather(this, padded):
            gathered = plain_gather(this, padded)
            self.incoming.carry(_size(padded) * (this.world_size - 1) // this.world_size)
            return gathered

        handle.flat_param_to, handle._all_gather_flat_param = flat_param_to, all_gather

    def _fsdp2(self) -> None:
        param, gather = _fsdp_param.FSDPParam, _fsdp_collectives.DefaultAllGather
        plain_inputs, plain_gather = param.all_gather_inputs.fget, gather.__call__

        @functools.wraps(plain_inputs)
        def all_gather_inputs(this):
            inputs = plain_inputs(this)
            if this.offload_to_cpu and torch.cuda.is_available():
                self.incoming.carry(sum(map(_size, inputs)))
            return inputs

        @functools.wraps(plain_gather)
        def all_gather(this, output_tensor, input_tensor, *args, **kwargs):
            work = plain_gather(this, output_tensor, input_tensor, *args, **kwargs)
            self.incoming.carry(_size(output_tensor) - _size(input_tensor))
            return work

        param.all_gather_inputs, gather.__call__ = property(all_gather_inputs), all_gather

    def _activations(self) -> None:
        from nbutils.patches.activation_offload import WaitingTensor

        plain_init, plain_fetch = WaitingTensor.__init__, WaitingTensor.fetch

        @functools.wraps(plain_init)
        def leave(this, tensor, stream):
            plain_init(this, tensor, stream)
            with torch.cuda.stream(stream):
                self.outgoing.carry(_size(tensor))

        @functools.wraps(plain_fetch)
        def fetch(this):
            if this.back is None:
                plain_fetch(this)
                with torch.cuda.stream(this.stream):
                    self.incoming.carry(_size(this.on_host))
                    this.ready = this.stream.record_event()

        WaitingTensor.__init__, WaitingTensor.fetch = leave, fetch


def host_copy_gbs(size: int = GIB // 4) -> float:
    """GB/s from pinned host memory to this rank's GPU, the best of three copies of `size` bytes."""
    source = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size, dtype=torch.uint8, device="cuda")
    return max(size / _seconds(lambda: target.copy_(source, non_blocking=True)) / 1e9 for _ in range(3))


@functools.cache
def cycles_a_second() -> float:
    """Cycles of `torch.cuda._sleep` in a second on this GPU."""
    cycles = 20_000_000
    torch.cuda._sleep(cycles)
    return cycles / _seconds(lambda: torch.cuda._sleep(cycles))


def _seconds(work) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()

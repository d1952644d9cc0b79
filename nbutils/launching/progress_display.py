"""What a launch shows while it trains: one line with step, loss and time left."""

import sys


def progress_line(lines: list[dict], seconds: float) -> str:
    """One line: bar, step, loss, time left.

    The time left follows from the steps of these lines: after a resume, those before it took none of their seconds.

    Args:
        lines: the progress of this launch, oldest first.
        seconds: since the launch.
    """
    counted = [line for line in lines if {"step", "max_steps", "seconds"} <= line.keys()]
    if not counted:
        return f"starting the ranks and loading the model ... {_clock(seconds)}"
    first, last = counted[0], counted[-1]
    step, steps = last["step"], max(1, last["max_steps"])
    parts = [f"[{'#' * round(20 * step / steps):.<20}] step {step}/{steps}"]
    for name, label in (("loss", "loss"), ("eval_loss", "held-out loss")):
        values = [line[name] for line in lines if name in line]
        if values:
            parts.append(f"{label} {values[-1]:.4f}")
    # The first line is written before the first step, and after a resume names the step it begins at.
    begun, at = (first["step"], first["seconds"]) if first["seconds"] < 1 else (0, 0.0)
    if begun < step < steps:
        parts.append(f"{_clock((last['seconds'] - at) / (step - begun) * (steps - step))} left")
    return " | ".join(parts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class ProgressDisplay:
    """The progress line: rewritten in a notebook and in a terminal; elsewhere its last state, once.

    Args:
        show: False shows nothing.
    """

    def __init__(self, show: bool):
        self.show = show
        self.handle = None
        self.last = 0.0
        self.notebook = show and _in_notebook()

    def begin(self, *sentences: str) -> None:
        """Print what stands above the line: the command, and what is in its way."""
        for sentence in filter(None, sentences if self.show else sentences[1:]):
            print(sentence, flush=True)

    def update(self, lines: list[dict], seconds: float) -> None:
        """Show the state, at most once a second."""
        if not self.show or seconds - self.last < 1:
            return
        self.last = seconds
        self._put(progress_line(lines, seconds))

    def close(self, lines: list[dict], seconds: float, how: str) -> None:
        """Show the last state and how it ended, as "finished"."""
        if not self.show:
            return
        text = progress_line(lines, seconds) if lines else ""
        ending = f"{how} after {_clock(seconds)}"
        self._put(f"{text} | {ending}" if text else ending, final=True)

    def _put(self, text: str, final: bool = False) -> None:
        if self.notebook:
            self._rewrite(text)
        elif sys.stdout.isatty():
            print(f"\r\033[K{text}", end="\n" if final else "", flush=True)
        elif final:
            print(text, flush=True)

    def _rewrite(self, text: str) -> None:
        from IPython.display import display

        bundle = {"text/plain": text}
        if self.handle is None:
            self.handle = display(bundle, raw=True, display_id=True)
        else:
            self.handle.update(bundle, raw=True)


def _in_notebook() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and hasattr(shell, "kernel")

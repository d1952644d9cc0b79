"""The end of a launch: its own processes, and nobody else's."""

import subprocess
import sys

import psutil

from nbutils.launching.process_tree import ProcessTree

PARENT = (
    "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); print('up', flush=True); time.sleep(60)"
)


def start() -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    return process


def test_a_process_that_got_the_number_of_a_dead_rank_is_left_alone():
    """After two days a process id comes round again; neither that process nor its children are the launch's."""
    launcher, stranger = start(), start()
    try:
        tree = ProcessTree(launcher)
        dead = psutil.Process(stranger.pid)
        dead._ident, dead._hash = (stranger.pid, 1.0), None  # a rank of long ago had this number
        tree.members.add(dead)
        tree.end()
        assert launcher.poll() is not None
        assert stranger.poll() is None
        children = psutil.Process(stranger.pid).children()
        assert [(child.name(), child.status()) for child in children] == [("sleep", psutil.STATUS_SLEEPING)]
    finally:
        for child in psutil.Process(stranger.pid).children():
            child.kill()
        stranger.kill()
        stranger.wait()


def test_children_are_ended_with_their_parents():
    launcher = start()
    children = psutil.Process(launcher.pid).children()
    tree = ProcessTree(launcher)
    tree.look()
    launcher.kill()
    launcher.wait()
    tree.end()
    assert children and not any(child.is_running() for child in children)

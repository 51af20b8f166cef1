"""Scripts as processes: their words, output, exit codes and signals, forked or not."""

import signal
import threading
import time
from multiprocessing.context import ForkServerProcess

import pytest

from circuit_breaking.runs.script_process import ScriptProcess

SCRIPT = """
import os, sys, time
import beside  # a module in the script's folder
loaded = "transformers" in sys.modules  # before this script has imported anything large
import torch

class Words:
    '''A class whose source is asked for, as settings are.'''

if __name__ == "__main__":
    import inspect
    print(sys.argv[1:], torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], beside.NAME, loaded)
    assert "whose source" in inspect.getsource(Words) and not sys.stderr.isatty()
    print("to stderr", file=sys.stderr)
    what = sys.argv[1]
    if what == "exit":
        sys.exit(7)
    if what == "fail":
        raise ValueError("as it happens")
    while what == "wait":
        time.sleep(0.01)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "beside.py").write_text("NAME = 'beside'")
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def run(script, log, *words, preloaded=("transformers",), send=None, threads=1):
    """The exit code of a script, and what it printed."""
    process = ScriptProcess(script, words, log, threads, preloaded)
    while (code := process.poll()) is None:
        if send is not None and "to stderr" in log.read_text():
            process.send_signal(send)
            send = None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # to one that has ended: nothing happens
    return code, log.read_text()


def test_words_output_and_exit_code(script, tmp_path):
    log = tmp_path / "logs" / "one.txt"
    code, said = run(script, log, "plain", "--more=1", threads=2)
    assert code == 0 and said.splitlines() == ["['plain', '--more=1'] 2 2 beside True", "to stderr"]
    assert run(script, log, "exit")[0] == 7
    code, said = run(script, log, "fail")
    assert code == 1 and said.splitlines()[-1] == "ValueError: as it happens"
    assert run(script, log, "wait", send=signal.SIGTERM)[0] == -signal.SIGTERM


def test_without_a_server_scripts_import_for_themselves(script, tmp_path):
    code, said = run(script, tmp_path / "log.txt", "exit", preloaded=())
    assert code == 7 and said.splitlines()[0].endswith("False")


def test_without_a_socket_for_the_server_scripts_import_for_themselves(script, tmp_path, monkeypatch):
    monkeypatch.setattr(ForkServerProcess, "_Popen", staticmethod(_no_socket))
    code, said = run(script, tmp_path / "log.txt", "exit")
    assert code == 7 and said.splitlines()[0].endswith("False")


def _no_socket(process):
    raise OSError("AF_UNIX path too long")


def test_many_at_once_from_several_threads(script, tmp_path):
    found = {}

    def work(name):
        for number in range(6):
            found[name, number] = run(script, tmp_path / f"{name}_{number}.txt", "exit", f"{name} {number}")

    threads = [threading.Thread(target=work, args=(name,)) for name in range(3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(found) == 18 and {code for code, _ in found.values()} == {7}
    assert all(f"'{name} {number}'" in said for (name, number), (_, said) in found.items())


def test_a_log_that_cannot_be_written_is_an_error_here(script, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        ScriptProcess(script, (), tmp_path / "file" / "log.txt", 1)

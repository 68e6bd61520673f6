import json
import subprocess

import torch

from harness.measure.environment import environment, git_state


def test_environment_is_json_and_complete_on_a_cpu():
    found = environment(torch.device("cpu"))
    assert found["gpu"] is None
    assert found["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert found["torch_threads"] >= 1
    json.dumps(found)


def test_no_checkout_is_null(tmp_path):
    assert git_state(tmp_path) == {"commit": None, "dirty": None}


def test_dirty_tree_is_seen(tmp_path):
    def git(*args):
        author = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", tmp_path, *author, *args], check=True, capture_output=True)

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    clean = git_state(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {"commit": clean["commit"], "dirty": True}

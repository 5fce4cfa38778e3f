"""Where a result comes from."""

from __future__ import annotations

from pnorm_decay.training import provenance


def test_a_copy_without_git_knows_its_commit_from_a_file(tmp_path, monkeypatch):
    module = tmp_path / "pwd" / "pnorm_decay" / "training" / "provenance.py"
    module.parent.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(module))
    assert provenance.git_commit.__wrapped__() == "unknown"
    (tmp_path / "commit.txt").write_text("0123456789+\n")
    assert provenance.git_commit.__wrapped__() == "0123456789+"

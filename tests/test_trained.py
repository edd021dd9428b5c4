"""The code of docs/trained.md is one script that runs, and its service answers the page's request."""

import json
import re
import time
from pathlib import Path

import torch
from starlette.testclient import TestClient

from vbdl.serve import Model, app

PAGE = (Path(__file__).parents[1] / "docs" / "trained.md").read_text()


def test_from_a_file_to_a_service_that_refuses(tmp_path, monkeypatch, traced_only, capsys):
    """Uncompiled, as the same graphs."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)):
        exec(compile(block, f"docs/trained.md, block {number + 1}", "exec"), names)

    x, y, noise = names["x_test"], names["y_test"], names["noise"]
    plain, laplace, calibrated = names["plain"](x), names["laplace"](x), names["calibrated"](x)
    assert float(plain.epistemic.abs().max()) == 0 and float(laplace.epistemic.mean()) > 0.01
    assert float(names["laplace"](noise).epistemic.mean()) > 1.5 * float(laplace.epistemic.mean())
    nll = lambda p: float(-p.probs[torch.arange(len(y)), y].log().mean())
    assert nll(calibrated) < nll(laplace), "what the page says of the temperature"
    assert names["referral"].certificate.n_kept > 0
    decided = names["decide"](x)
    assert names["same"](x).action.equal(decided.action)
    of_noise = names["decide"](noise)
    assert float((of_noise.action == -1).float().mean()) > 0.5
    assert float(names["guard"].refers(names["laplace"], noise).float().mean()) > 0.5
    assert float(names["guard"].refers(names["laplace"], x).float().mean()) < 0.08
    assert "referred" in capsys.readouterr().out

    (body,) = re.findall(r'python -c "(.*?)" > row.json', PAGE, flags=re.DOTALL)
    exec("\n".join(line.strip() for line in body.splitlines()), {})
    row = json.loads(capsys.readouterr().out)
    with TestClient(app(Model(tmp_path / "digits.vbdl", compile=False))) as client:
        while client.get("/ready").status_code != 200:
            time.sleep(0.02)
        (answer,) = client.post("/v1/predict", json=row).json()["predictions"]
    said = {"probs", "label", "total", "aleatoric", "epistemic", "sets", "action", "decision", "reason", "distance"}
    assert said <= answer.keys() and answer["label"] == str(answer["action"]) and answer["decision"] == "answer"

"""The Hub's mixin, without a network: a fake Hub takes what is pushed and gives it back."""

import shutil

import pytest
import torch
from torch import nn

import vbdl
from vbdl.artifact import ArtifactError

huggingface_hub = pytest.importorskip("huggingface_hub")
httpx = pytest.importorskip("httpx")


def predictor() -> vbdl.Predictor:
    q = vbdl.DeepEnsemble([nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(3)])
    return vbdl.Predictor(q, vbdl.Categorical(), compile=False)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub as folders: uploads are copied in, downloads are links into a cache, as huggingface_hub makes them."""
    from vbdl.artifact import hub as module

    store = tmp_path / "hub"

    class Api:
        def __init__(self, *args, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return type("Url", (), {"repo_id": repo_id})()

        def upload_folder(self, repo_id, folder_path, **kwargs):
            shutil.copytree(folder_path, store / repo_id)
            return f"hub:{repo_id}"

    def download(repo_id, filename, **kwargs):
        found = store / repo_id / filename
        if not found.is_file():
            answer = httpx.Response(404, request=httpx.Request("GET", "http://localhost"))
            raise huggingface_hub.errors.RemoteEntryNotFoundError(f"{repo_id} has no {filename}", response=answer)
        link = tmp_path / "cache" / repo_id / filename
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(found)
        return str(link)

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    monkeypatch.setattr(module, "hf_hub_download", download)
    return store, module.HubPredictor


def test_pushed_and_pulled_is_the_same(hub):
    store, HubPredictor = hub
    predict, x = predictor(), torch.randn(5, 4)
    HubPredictor(predict, metrics={"accuracy": 0.5}, extras={"a": 1}).push_to_hub("me/model")
    assert sorted(p.name for p in (store / "me/model").iterdir()) == ["README.md", "manifest.json", "model.safetensors"]
    assert "library_name: vbdl" in (store / "me/model/README.md").read_text()
    pulled = HubPredictor.from_pretrained("me/model", seed=3)
    assert torch.equal(pulled(x).probs, predict(x).probs) and pulled.predictor.seed == 3
    assert pulled.predictor.manifest.extras == {"a": 1} and pulled.predictor.manifest.metrics == {"accuracy": 0.5}


def test_what_comes_from_the_hub_is_checked(hub):
    store, HubPredictor = hub
    HubPredictor(predictor()).push_to_hub("me/model")
    path = store / "me/model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="truncated or replaced"):
        HubPredictor.from_pretrained("me/model")


def test_a_folder_of_ones_own(hub, tmp_path):
    _, HubPredictor = hub
    predict, x = predictor(), torch.randn(5, 4)
    HubPredictor(predict).save_pretrained(tmp_path / "model")
    assert torch.equal(vbdl.load(tmp_path / "model")(x).probs, predict(x).probs)
    assert torch.equal(HubPredictor.from_pretrained(tmp_path / "model")(x).probs, predict(x).probs)

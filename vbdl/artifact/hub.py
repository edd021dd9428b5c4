"""Artifacts on the Hugging Face Hub: `from_pretrained`, `save_pretrained`, `push_to_hub` (huggingface_hub's mixin).

Needs the extra `hub`. No other module of vbdl.artifact accesses the network.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from vbdl.types import Inputs, Prediction

try:
    from huggingface_hub import ModelHubMixin, hf_hub_download
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("the Hub needs the extra `hub`: pip install 'vbdl[hub]'") from error

from vbdl.artifact.files import locate, write_files
from vbdl.artifact.loading import LoadOptions, load_files
from vbdl.artifact.manifest import MANIFEST, TENSORS
from vbdl.artifact.saving import SaveOptions, contents
from vbdl.engine.predictor import Predictor

if TYPE_CHECKING:
    from vbdl.engine.adaptive import Rule


class HubPredictor(ModelHubMixin, library_name="vbdl", tags=["uncertainty", "bayesian-deep-learning"]):
    """A predictor with the methods of huggingface_hub's ModelHubMixin.

        HubPredictor(predict).push_to_hub("me/model")
        predict = HubPredictor.from_pretrained("me/model").predictor

    The constructor takes the options of `vbdl.save` (extras, metrics, example, architecture, arguments),
    `from_pretrained` those of `vbdl.load` (module, trust, settings of the predictor). Files from the Hub are checked
    like any other artifact; no code in them is executed.
    """

    def __init__(self, predictor: Predictor, **save_options: Unpack[SaveOptions]):
        self.predictor, self._options = predictor, save_options

    def __call__(
        self,
        x: Inputs,
        samples: bool = False,
        *,
        tolerance: "float | Rule | None" = None,
        deadline: float | None = None,
    ) -> Prediction:
        return self.predictor(x, samples, tolerance=tolerance, deadline=deadline)

    def _save_pretrained(self, save_directory: Path) -> None:
        self._hub_mixin_config = None  # keeps the mixin from writing a config.json beside the manifest
        write_files(save_directory, contents(self.predictor, **self._options))

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **options: Unpack[LoadOptions],
    ) -> "HubPredictor":
        if Path(model_id).is_dir():
            return cls(load_files(locate(Path(model_id)), **options))
        download = {
            "revision": revision,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
        }
        # the Hub's cache holds symbolic links, which `open_regular` refuses
        names = (MANIFEST, TENSORS)
        files = {name: Path(hf_hub_download(model_id, name, **download)).resolve() for name in names}
        return cls(load_files(files, **options))

"""Where data come from: a folder, scikit-learn's own sets, or OpenML by name where a network exists."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

# of the files that published numbers here were made with; another file of the name would give other numbers
SHA256 = {
    "boston.npz": "25c446659b57df582435552861ec79656de50f372d7378a302aaaf158a348393",
    "concrete.npz": "e5c82a81795fde6377920ed65e4673a959b7d3f52cea09b9e5cf3e35d5c18bae",
    "energy.npz": "3784ffaf4a96b00555184a0b83391416701a12729968aa0e606598300dded0c1",
    "kin8nm.npz": "d5971816e0954b71b66d8e3f410d693ff84e2ec0afaebf890dcbaa1ade158df0",
    "naval.npz": "0711c1dcc9d9e1c98ac0a1ddbc90f1538d8d57087902756fa6969720c5da2bbe",
    "power.npz": "bfd3d1c439b07a8a3c7c0d9079340ccd62878e48826000b024d2752ebc179617",
    "protein.npz": "ef3fff40e605c734d045378435e606571e9e2a0a8ff79d6a0d66abf1ec8ad83e",
    "wine.npz": "ac883ad109e68d225482e55142e4f4491b8d7a84396a07c85c8ddf4920611747",
    "yacht.npz": "265037c2ffdd80445a3d1ad69d99a4381320232ed54cfe2f9aea70fac575c87e",
    "fashion_mnist.npz": "5b6d2c4c694a91887af8ab7d039c04f80af3c29378d731c93a538d2e831aa469",
    "pneumoniamnist.npz": "1779d55752c1bf80b2d39debcb7d5952b6dfd897d272f3238cc2b0a0bb342c3c",
    "gtsrb_small.npz": "be8f22c96db34816470e500e31251fab4e1c37f10a9c413df40ed5b14bda1d27",
    "diabetic_retinopathy_debrecen.csv.gz": "b1a218f1535825a4d10d1e384709166d60643b1153d4d7f72608231c00ae112e",
    "pima_diabetes.csv.gz": "5255ba95dcc251b031c0e1a0e7323bacb9324f15278b88dbcdcaa6fdffd7c823",
    "german_credit.csv.gz": "b76d74c13b8fc37ad1a16779227d5b3eca2cebc0b308991be5fe822f811e33e9",
}


class DataMissingError(OSError):
    """Neither the folder nor the network has a data set."""


class Source:
    """A folder of data sets, and the network for what is not in it.

    folder: as `--data` or VBDL_DATA give it; files are looked for in it and in its sub-folders of the usual names.
    network: whether OpenML may be asked.
    """

    def __init__(self, folder: Path | str | None = None, network: bool = True):
        self.folder = None if folder is None else Path(folder)
        self.network = network
        if self.folder is not None and not self.folder.is_dir():
            raise FileNotFoundError(f"the data folder {self.folder} is not there: give another --data, or VBDL_DATA")

    def find(self, path: str) -> Path | None:
        """The file of this path, or of its name, in the folder; its checksum is compared. None where it is not."""
        if self.folder is None:
            return None
        for found in (self.folder / path, self.folder / Path(path).name):
            if found.is_file():
                self._check(found)
                return found
        return None

    @staticmethod
    def _check(file: Path) -> None:
        wanted = SHA256.get(file.name)
        if wanted is None:
            return
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != wanted:
            raise ValueError(
                f"{file} is not the file that the published numbers belong to (SHA-256 {digest[:12]}..., wanted "
                f"{wanted[:12]}...): fetch it again, or register your copy as a data set of your own"
            )

    def arrays(self, path: str) -> dict[str, np.ndarray] | None:
        """The arrays of an .npz file, without pickles, or None where it is not there."""
        file = self.find(path)
        if file is None:
            return None
        with np.load(file, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}

    def missing(self, name: str, path: str, said: str = "") -> "DataMissingError":
        """The error for a set that nothing has; path: of the file that would have been read."""
        where = (
            f"{path} is not in the folder {self.folder}" if self.folder else f"no folder was given to find {path} in"
        )
        return DataMissingError(
            f"{name}: {where}{said}. Put it into a folder and give that with --data (or VBDL_DATA), or run "
            f"`vbdl bench --suite bundled`, which needs no download"
        )

    def openml(self, name: str, openml_name: str | None, shape: tuple[int, int], path: str) -> tuple[Any, Any]:
        """(inputs, targets) from OpenML by name, of this shape. DataMissingError says what to do without a network.

        name: of the data set here.  path: of the file that would have been read.
        """
        if openml_name is None or not self.network:
            raise self.missing(name, path)
        try:
            from sklearn.datasets import fetch_openml
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("OpenML is read with scikit-learn: pip install 'vbdl[demo]'") from error
        try:
            found: Any = fetch_openml(name=openml_name, version=1, as_frame=False, parser="liac-arff")
        except Exception as error:  # sklearn raises whatever urllib and the server make of it
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise self.missing(name, path, f", and OpenML did not answer ({said})") from error
        if tuple(found.data.shape) != shape:
            said = f", and OpenML's {openml_name!r} is {tuple(found.data.shape)} where the published set is {shape}"
            raise self.missing(name, path, said)
        return found.data, found.target

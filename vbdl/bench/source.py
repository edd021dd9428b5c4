"""The source of the suite's data: a local folder, or OpenML by name if the network may be used."""

import hashlib
from pathlib import Path

import numpy as np

# file name -> SHA-256 of the files that the published numbers belong to
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
    """Raised if neither the folder nor the network has a data set."""


class Source:
    """A source of data sets: a folder, and OpenML for those that are not in it.

    folder: from `--data` or VBDL_DATA; a file may lie in its usual sub-folder or directly in the folder.
    network: whether OpenML may be used.
    """

    def __init__(self, folder: Path | str | None = None, network: bool = True):
        self.folder = None if folder is None else Path(folder)
        self.network = network
        if self.folder is not None and not self.folder.is_dir():
            raise FileNotFoundError(f"the data folder {self.folder} does not exist: give another --data, or VBDL_DATA")

    def find(self, path: str) -> Path | None:
        """Find a file by its path or name in the folder, and check its SHA-256; None if it is not there."""
        if self.folder is None:
            return None
        for file in (self.folder / path, self.folder / Path(path).name):
            if file.is_file():
                self._check(file)
                return file
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
                f"{file} is not the file that the published numbers belong to (SHA-256 {digest[:12]}..., expected "
                f"{wanted[:12]}...): fetch it again, or register your copy as a data set of your own"
            )

    def arrays(self, path: str) -> dict[str, np.ndarray] | None:
        """The arrays of an .npz file by name, without unpickling, or None if the file is not there."""
        file = self.find(path)
        if file is None:
            return None
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}

    def missing(self, name: str, path: str, reason: str = "") -> "DataMissingError":
        """The DataMissingError for a data set. path: of its file; reason: text that is added to the message."""
        where = (
            f"{path} is not in the folder {self.folder}" if self.folder else f"no folder was given to find {path} in"
        )
        return DataMissingError(
            f"{name}: {where}{reason}. Put it into a folder and give that with --data (or VBDL_DATA), or run "
            f"`vbdl bench --suite bundled`, which needs no download"
        )

    def openml(
        self, name: str, openml_name: str | None, shape: tuple[int, int], path: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Fetch (inputs, targets) from OpenML; DataMissingError, which says what to do, if that is impossible.

        name: the data set's name here. openml_name: its name on OpenML, or None. shape: the expected shape of inputs.
        path: of the file that was not in the folder.
        """
        if openml_name is None or not self.network:
            raise self.missing(name, path)
        try:
            from sklearn.datasets import fetch_openml
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("OpenML is read with scikit-learn: pip install 'vbdl[demo]'") from error
        try:
            fetched = fetch_openml(name=openml_name, version=1, as_frame=False, parser="liac-arff")
        except Exception as error:  # sklearn raises errors of many types for network and server failures
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise self.missing(name, path, f", and OpenML did not answer ({reason})") from error
        assert not isinstance(fetched, tuple)  # which is returned with return_X_y only
        if tuple(fetched.data.shape) != shape:
            reason = f", and OpenML's {openml_name!r} is {tuple(fetched.data.shape)} where the published set is {shape}"
            raise self.missing(name, path, reason)
        return fetched.data, fetched.target

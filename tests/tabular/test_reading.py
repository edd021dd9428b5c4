"""Tables from files."""

import gzip

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from vbdl.tabular import as_table, read_table

DATA = pa.table({"a": [1.5, None, 3.0], "b": ["x", "y", None], "c": [1, 2, 3]})


def write(folder, name):
    path = folder / name
    if ".parquet" in name:
        pa.parquet.write_table(DATA, path)
    elif name.endswith(".feather"):
        pa.feather.write_feather(DATA, path)
    elif name.endswith(".arrow"):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, DATA.schema) as writer:
            writer.write_table(DATA)
    else:
        sep = "\t" if ".tsv" in name else ","
        text = "\n".join(
            sep.join(row) for row in (["a", "b", "c"], ["1.5", "x", "1"], ["", "y", "2"], ["3.0", "NA", "3"])
        )
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("name", ["t.parquet", "t.feather", "t.arrow", "t.csv", "t.csv.gz", "t.tsv", "T.CSV"])
def test_every_format_gives_the_same_table(tmp_path, name):
    assert read_table(write(tmp_path, name)).to_pylist() == DATA.to_pylist()


def test_a_late_decimal_point_is_seen(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a\n" + "1\n" * 600_000 + "2.5\n")
    assert read_table(path)["a"].type == pa.float64()


def test_a_folder_is_its_files_in_order(tmp_path):
    write(tmp_path, "b.csv"), write(tmp_path, "a.parquet"), write(tmp_path, "_hidden.csv"), write(tmp_path, ".x.csv")
    assert read_table(tmp_path).num_rows == 6


@pytest.mark.parametrize(
    "data",
    [DATA, DATA.to_batches()[0], DATA.to_pandas(), {"a": [1.5, None, 3.0], "b": ["x", "y", None], "c": [1, 2, 3]}],
)
def test_tables_in_memory(data):
    assert as_table(data).select(["a", "c"]).to_pylist() == DATA.select(["a", "c"]).to_pylist()


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("t.csv", "a;b\n1,5;x\n2,5;y\n", "separates its columns by ';'"),
        ("t.csv", "a;b\n1;x\n2;y\n", "separates its columns by ';'"),
        ("t.csv", "a\tb\n1\tx\n", "separates its columns by '\\\\t'"),
        ("t.tsv", "a,b\n1,x\n", "separates its columns by ','"),
        ("t.csv", "a,b\n1,\xc9vora\n2,y\n", "column 'b' is not text in UTF-8"),
        ("t.csv", "\xc9vora,b\n1,2\n", "the first line is not text in UTF-8"),
    ],
)
def test_what_a_spreadsheet_wrote_otherwise_is_said(tmp_path, name, text, said):
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=said):
        read_table(tmp_path / name)


@pytest.mark.parametrize("name, header", [("t.tsv", "price, EUR"), ("t.csv", "price; EUR"), ("t.tsv.gz", "a,b;c")])
def test_the_name_of_a_single_column_may_have_a_separator_in_it(tmp_path, name, header):
    text = f'"{header}"\n1.5\n2.5\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert read_table(tmp_path / name).to_pydict() == {header: [1.5, 2.5]}


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "t.csv").write_text("a,b,a\n1,2,3\n")
    for data in (tmp_path / "t.csv", pa.table([[1], [2], [3]], names=["a", "b", "a"])):
        with pytest.raises(ValueError, match="two columns are called 'a'"):
            as_table(data)


def test_text_in_views_is_text():
    """What a polars frame gives, words and categories."""
    if not hasattr(pa, "string_view"):
        pytest.skip("needs a pyarrow with views of text, 16 or later")
    from vbdl.tabular import infer

    views = pa.array(["p", "q"] * 20, pa.string_view())
    codes = pa.array([0, 1] * 20, pa.uint32())
    frame = pa.table({"word": views, "code": pa.DictionaryArray.from_arrays(codes, views[:2]), "y": [1.5, 2.5] * 20})
    schema, _ = infer(as_table(frame), "y")
    assert schema.encode(frame).x[:2].tolist() == [[1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 1, 0]]


def test_pandas_categories_are_text():
    from vbdl.tabular import infer

    frame = pd.DataFrame({"x": pd.Categorical(["u", "v"] * 20), "y": np.arange(40) + 0.5})
    assert infer(as_table(frame), "y")[0].columns[0].categories == ("u", "v")


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("t.parquet", b"not parquet", "cannot be read as parquet"),
        ("t.arrow", b"ARROW1 not really", "cannot be read as ipc"),
        ("t.csv", b"a,b\n1,2\n1,2,3\n", "cannot be read as csv"),
        ("t.xlsx", b"", "is none of"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{said}"):
        read_table(tmp_path / name)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"no \.csv.* file"):
        read_table(tmp_path)
    with pytest.raises(TypeError, match="got int"):
        as_table(3)

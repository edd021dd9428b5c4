"""Tables: columns with types, missing cells and categories in, numbers for a network out, and back to words.

`infer` makes a `Schema` from a table; `Schema.encode(table)` and `Schema.encode_rows(dicts)` make the network's input,
the same numbers bit for bit; `fit_table` trains, calibrates and evaluates a predictor. An artefact that `fit_table` has
saved carries its schema: `schema_of(extras)`.
"""

from collections.abc import Mapping
from typing import Any

from vbdl.tabular.fitting import Fitted as Fitted
from vbdl.tabular.fitting import fit_table as fit_table
from vbdl.tabular.inference import infer as infer
from vbdl.tabular.reading import as_table as as_table
from vbdl.tabular.reading import read_table as read_table
from vbdl.tabular.schema import KEY
from vbdl.tabular.schema import Encoded as Encoded
from vbdl.tabular.schema import Schema as Schema
from vbdl.tabular.settings import Settings as Settings


def schema_of(extras: Mapping[str, Any] | None) -> Schema | None:
    """The schema in an artefact's extras, None where its model was not made from a table."""
    found = (extras or {}).get(KEY)
    return None if found is None else Schema.from_dict(found)

"""Models of tables: typed columns, missing cells and categories are encoded as a network's numbers.

`infer` makes a `Schema` from a table. `Schema.encode(table)` and `Schema.encode_rows(dicts)` make the network's input,
equal bit for bit. `fit_table` trains, calibrates and evaluates a predictor. `schema_of(extras)` reads the schema from
the artifact of such a predictor.
"""

from collections.abc import Mapping

from vbdl import former
from vbdl.tabular.fitting import Fitted as Fitted
from vbdl.tabular.fitting import fit_table as fit_table
from vbdl.tabular.inference import infer as infer
from vbdl.tabular.options import TableOptions as TableOptions
from vbdl.tabular.reading import as_table as as_table
from vbdl.tabular.reading import read_table as read_table
from vbdl.tabular.schema import KEY
from vbdl.tabular.schema import Encoded as Encoded
from vbdl.tabular.schema import Schema as Schema


def schema_of(extras: Mapping[str, object] | None) -> Schema | None:
    """The schema in the extras of an artifact, or None if its model was not trained on a table."""
    description = (extras or {}).get(KEY)
    return None if description is None else Schema.from_dict(description)


__getattr__ = former.names(__name__, {"Settings": "TableOptions"})

"""A predictor over HTTP: `vbdl serve MODEL`, `app(Model(folder))` for any ASGI server, `ray.deployment` for Ray."""

from vbdl.serve.app import app as app
from vbdl.serve.limits import Limits as Limits
from vbdl.serve.model import Model as Model

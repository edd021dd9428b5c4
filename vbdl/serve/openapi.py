"""The OpenAPI description of a service, made from its model."""

import vbdl
from vbdl.serve import json_schema
from vbdl.serve.limits import Limits
from vbdl.serve.model import Model
from vbdl.types import Json

_NUMBER = {"type": ["number", "null"]}
_ANY = {"description": "a number, or an array of numbers where outputs are several"}


def document(model: Model, limits: Limits, token: bool) -> Json:
    """Return the OpenAPI 3.1 document, with the columns or shapes of this model's rows."""
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    refused = {
        "400": "the body cannot be read",
        "408": "the body came too slowly",
        "413": f"more than {limits.body_bytes} bytes or {limits.rows} rows",
        "415": "a kind of body that is not taken",
        "422": "rows that do not fit the model; the message says which and why",
        "503": "too busy, not ready yet or shutting down; Retry-After says when to come again",
        "504": "the deadline passed",
    }
    if token:
        refused["401"] = "no token, or a wrong one"
    refused["421"] = "a Host header that is not allowed"
    responses: Json = {status: {"description": reason, "content": error} for status, reason in refused.items()}
    responses["503"]["headers"] = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}}}
    responses["200"] = {
        "description": "a prediction for each row, in their order",
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/Predictions"}},
            "application/vnd.apache.arrow.stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
    guarded = {"401": responses["401"]} if token else {}
    plain = lambda description, media, extra=None: {
        "200": {"description": description, "content": {media: {}}},
        "421": responses["421"],
        **(extra or {}),
    }
    probe = {"503": {"description": "not now", "content": {"application/json": {}}}}
    body: Json = {"application/json": {"schema": json_schema.body(model.schema, model.manifest.inputs, limits.rows)}}
    binary = {"schema": {"type": "string", "format": "binary"}}
    body["application/vnd.apache.arrow.stream"] = binary
    if model.schema is None and len(model.bodies.entries) == 1:
        body["application/x-npy"] = binary
    openapi: Json = {
        "openapi": "3.1.0",
        "info": {
            "title": model.name,
            "version": vbdl.__version__,
            "description": "Predictions with their uncertainty. total = aleatoric + epistemic, in nats for classes and "
            "in squared target units for numbers.",
        },
        "paths": {
            "/v1/predict": {
                "post": {
                    "operationId": "predict",
                    "summary": "Predict rows",
                    "parameters": [
                        {
                            "name": "X-Deadline-Ms",
                            "in": "header",
                            "description": "Milliseconds until the answer is of no use: 504 after that, a predictor "
                            f"that can uses fewer draws before. {limits.deadline:g} s unless given.",
                            "schema": {"type": "integer", "minimum": 1, "maximum": 999_999_999},
                        }
                    ],
                    "requestBody": {"required": True, "content": body},
                    "responses": responses,
                }
            },
            "/v1/model": {
                "get": {
                    "operationId": "model",
                    "summary": "The model card",
                    "responses": plain("what the model is", "application/json", guarded),
                }
            },
            "/health": {
                "get": {
                    "operationId": "health",
                    "summary": "Liveness",
                    "security": [],
                    "responses": plain("alive", "application/json", probe),
                }
            },
            "/ready": {
                "get": {
                    "operationId": "ready",
                    "summary": "Readiness",
                    "security": [],
                    "responses": plain("ready to predict", "application/json", probe),
                }
            },
            "/metrics": {
                "get": {
                    "operationId": "metrics",
                    "summary": "Prometheus metrics",
                    "responses": plain("counters", "text/plain", guarded),
                }
            },
        },
        "components": {
            "schemas": {
                "Error": {
                    "type": "object",
                    "properties": {
                        "error": {
                            "type": "object",
                            "properties": {"code": {"type": "string"}, "message": {"type": "string"}},
                            "required": ["code", "message"],
                        }
                    },
                    "required": ["error"],
                },
                "Predictions": {
                    "type": "object",
                    "properties": {
                        "predictions": {"type": "array", "items": {"$ref": "#/components/schemas/Prediction"}},
                        "n_samples": {
                            "type": ["integer", "array"],
                            "items": {"type": "integer"},
                            "description": "draws that were averaged; of each row, where a deadline made them differ",
                        },
                        "classes": {"type": "array", "description": "what each probability is of"},
                        "notes": {"type": "object", "description": "cells by column that were imputed or unseen"},
                    },
                    "required": ["predictions", "n_samples"],
                },
                "Prediction": {
                    "type": "object",
                    "description": "null stands for infinite and for what one draw cannot tell",
                    "properties": {
                        "probs": {"description": "probability of each class, or of 1"},
                        "label": {"description": "the most probable class"},
                        "mean": _ANY,
                        "std": _ANY,
                        "total": _ANY,
                        "aleatoric": _ANY,
                        "epistemic": _ANY,
                        "lower": _ANY,
                        "upper": _ANY,
                        "confidence": _NUMBER | {"description": "probability of the label"},
                        "sets": {"type": "array", "description": "classes of the conformal set"},
                        "action": {
                            "description": "what the decision says, as a number; of a referral the class's number, "
                            "or -1: refer the row to a person"
                        },
                        "decision": {
                            "type": "string",
                            "description": "the action in words; of a referral: answer, or refer (to a person)",
                        },
                        "reason": {"type": ["string", "null"], "description": "why the row is referred"},
                        "distance": _NUMBER | {"description": "from the training rows, in the space of features"},
                    },
                    "required": ["total", "aleatoric", "epistemic"],
                },
            }
        },
    }
    if token:
        openapi["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        openapi["security"] = [{"token": []}]
    return openapi

#!/usr/bin/env python3
"""Requests made from the OpenAI document against a gateway: none may end with 5xx, no answer may break its schema.

    pip install schemathesis
    walk.py http://127.0.0.1:31313 MODEL openapi.json [requests an operation]
"""

import json
import pathlib
import subprocess
import sys
import tempfile

url, model, document = sys.argv[1:4]
most = sys.argv[4] if len(sys.argv) > 4 else "100"
api = json.loads(pathlib.Path(document).read_text())
wanted = {
    "/chat/completions": ["post"],
    "/completions": ["post"],
    "/embeddings": ["post"],
    "/models": ["get"],
    "/models/{model}": ["get"],
}
api["paths"] = {path: {method: api["paths"][path][method] for method in methods} for path, methods in wanted.items()}
for path in api["paths"].values():
    for operation in path.values():
        # An error of ours is one of OpenAI's; the document writes none down.
        operation["responses"]["default"] = {"description": "an error"}
        operation.pop("callbacks", None)
api.pop("security", None)
api.pop("webhooks", None)
schemas = api["components"]["schemas"]


def properties(name):
    """Every object with the properties of a request, its parts included."""
    open_ = [schemas[name]]
    while open_:
        schema = open_.pop()
        if "$ref" in schema:
            schema = schemas[schema["$ref"].rsplit("/", 1)[1]]
        if "properties" in schema:
            yield schema["properties"]
        open_ += schema.get("allOf", [])


for name in ["CreateChatCompletionRequest", "CreateCompletionRequest", "CreateEmbeddingRequest"]:
    for known in properties(name):
        if "model" in known:
            known["model"] = {"type": "string", "enum": [model]}
        for limit in ["max_tokens", "max_completion_tokens"]:
            if limit in known:
                known[limit] = {"type": "integer", "minimum": 1, "maximum": 8}
        # A stream is no JSON; streams are checked chunk by chunk elsewhere.
        for stream in ["stream", "stream_options"]:
            known.pop(stream, None)

# The document offers base64 in the request and forgets it in the answer.
vector = schemas["Embedding"]["properties"]["embedding"]
schemas["Embedding"]["properties"]["embedding"] = {"anyOf": [vector, {"type": "string"}]}

with tempfile.TemporaryDirectory() as folder:
    filtered = pathlib.Path(folder) / "openapi.json"
    filtered.write_text(json.dumps(api))
    command = [pathlib.Path(sys.executable).parent / "st", "run", filtered, "--url", url + "/v1"]
    command += ["--phases", "examples,coverage,fuzzing", "--max-examples", most, "--continue-on-failure"]
    command += ["--checks", "not_a_server_error,response_schema_conformance,content_type_conformance"]
    command += ["--suppress-health-check", "all", "--warnings", "off", "--request-timeout", "30", "--generation-database", "none"]
    sys.exit(subprocess.run(command, cwd=folder).returncode)

#!/usr/bin/env python3
"""The cache that `neuron pull` writes is one that huggingface_hub reads, and the other way round; and TLS, with openssl's
certificates.

    pip install huggingface_hub
    python tests/sdk/hub_cache.py target/debug/neuron

Starts a hub of its own on loopback; nothing else is asked.
"""

import hashlib
import http.server
import json
import os
import pathlib
import ssl
import subprocess
import sys
import tempfile
import threading

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"m-Q8_0.gguf": bytes(range(256)) * 4096, "generation_config.json": b'{"temperature": 0.6}'}


def etag(name: str) -> str:
    content = FILES[name]
    if name.endswith(".gguf"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.rsplit("/", 1)[-1]
        if path.startswith("/api/models/org/repo"):
            siblings = [{"rfilename": name} for name in FILES]
            self.answer(json.dumps({"id": "org/repo", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith("/org/repo/resolve/") and name in FILES:
            facts = {"x_repo_commit": COMMIT, "etag": f'"{etag(name)}"'}
            if name.endswith(".gguf"):
                facts |= {"x_linked_etag": f'"{etag(name)}"', "x_linked_size": str(len(FILES[name]))}
            self.answer(FILES[name], **facts)
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def serve(context: ssl.SSLContext | None = None) -> int:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


def certified(folder: pathlib.Path) -> ssl.SSLContext:
    """Makes `ca.pem`, and a server's certificate that it signed."""
    def run(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    run("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=test ca")
    (folder / "names").write_text("subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n")
    run("req", *key, "-keyout", "hub.key", "-out", "hub.csr", "-subj", "/CN=localhost")
    sign = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names", "-days", "2"]
    run("x509", "-req", "-in", "hub.csr", *sign, "-out", "hub.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "hub.pem", folder / "hub.key")
    return context


def neuron(program: str, cache: pathlib.Path, **variables: str) -> pathlib.Path:
    environment = {"PATH": os.environ["PATH"], "HF_HUB_CACHE": str(cache), **variables}
    output = subprocess.run([program, "pull", "org/repo:Q8_0"], env=environment, capture_output=True, text=True)
    if output.returncode != 0:
        raise RuntimeError(output.stderr)
    return pathlib.Path(output.stdout.strip())


def main() -> None:
    program = sys.argv[1]
    endpoint = f"http://127.0.0.1:{serve()}"
    os.environ |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    import huggingface_hub as hf

    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = pathlib.Path(folder, "ours"), pathlib.Path(folder, "theirs")
        path = neuron(program, ours, HF_ENDPOINT=endpoint)
        assert path.read_bytes() == FILES["m-Q8_0.gguf"]
        for name in FILES:
            found = hf.hf_hub_download("org/repo", name, cache_dir=ours, local_files_only=True)
            assert pathlib.Path(found) == path.with_name(name), found
        scan = hf.scan_cache_dir(ours)
        assert not scan.warnings and len(scan.repos) == 1, scan
        for name in FILES:
            hf.hf_hub_download("org/repo", name, cache_dir=theirs)
        found = neuron(program, theirs, HF_ENDPOINT="http://127.0.0.1:1", HF_HUB_OFFLINE="1")
        assert found.read_bytes() == FILES["m-Q8_0.gguf"] and found.is_relative_to(theirs)

        def tree(root: pathlib.Path) -> list[tuple[str, str]]:
            paths = (path for path in (root / "models--org--repo").rglob("*") if path.is_symlink() or path.is_file())
            link = lambda path: os.readlink(path) if path.is_symlink() else ""
            return sorted((str(path.relative_to(root)), link(path)) for path in paths)

        assert tree(ours) == tree(theirs), (tree(ours), tree(theirs))
        secret = f"https://localhost:{serve(certified(pathlib.Path(folder)))}"
        authority = str(pathlib.Path(folder, "ca.pem"))
        path = neuron(program, pathlib.Path(folder, "tls"), HF_ENDPOINT=secret, SSL_CERT_FILE=authority)
        assert path.read_bytes() == FILES["m-Q8_0.gguf"]
        try:
            neuron(program, pathlib.Path(folder, "none"), HF_ENDPOINT=secret)
            raise AssertionError("a certificate that nobody vouches for was believed")
        except RuntimeError as error:
            assert "certificate" in str(error), error
    print(f"huggingface_hub {hf.__version__} and neuron share a cache: {len(FILES)} files each way, equal trees; TLS holds")


if __name__ == "__main__":
    main()

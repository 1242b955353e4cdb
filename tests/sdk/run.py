#!/usr/bin/env python3
"""Starts a fleet and runs other people's software against it: the OpenAI SDKs for Python and Node, and schemathesis.

    run.py target/debug/cortex target/debug/neuron [--model demo.gguf] [--document openapi.json] [--keep folder]

Without a model the worker's 'fake' harness answers, which target/debug/test-neuron has (cargo build -p fleet-tests). What the
scripts need is installed into a folder of its own; needs Python with venv, and Node for its script, which is skipped, loudly,
where Node is absent.
"""

import argparse
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
NEURONS = 2


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until_ready(child, url, log):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if child.poll() is not None:
            sys.exit(f"a program ended:\n{log.read_text()}")
        try:
            if urllib.request.urlopen(url, timeout=2).status == 200:
                return
        except OSError:
            time.sleep(0.05)
    sys.exit(f"not ready after a minute:\n{log.read_text()}")


class Fleet:
    def __init__(self, folder, cortex, neuron, model):
        self.folder, self.children = folder, []
        path = f'path = "{model.resolve()}"' if model else 'harness = "fake"'
        # A fake model says what it is told to, in any form.
        caller = '' if model else '[[default_models]]\nid = "caller"\nharness = "fake"\ntool_parser = "qwen3_coder"'
        entries = ""
        for i in range(NEURONS):
            control = free_port()
            self.start(neuron, f"neuron-{i}", control, f'''
                [node]
                id = "neuron-{i}"
                [data]
                bind = "127.0.0.1:0"
                [control]
                bind = "127.0.0.1:{control}"
                [harness.candle]
                kv_cache_mib = 64
                [[default_models]]
                id = "demo"
                {path}
                required = true
                {caller}''')
            entries += f'[[neurons]]\ncontrol = "127.0.0.1:{control}"\n'
        api, admin = free_port(), free_port()
        self.url = f"http://127.0.0.1:{api}"
        self.start(cortex, "cortex", admin, f'[api]\nbind = "127.0.0.1:{api}"\n[admin]\nbind = "127.0.0.1:{admin}"\n{entries}')

    def start(self, program, name, probe, config):
        (self.folder / f"{name}.toml").write_text(config)
        log = self.folder / f"{name}.log"
        command = [program.resolve(), "serve", "--config", self.folder / f"{name}.toml"]
        self.children.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log.open("w")))
        until_ready(self.children[-1], f"http://127.0.0.1:{probe}/readyz", log)

    def stop(self):
        for child in reversed(self.children):
            child.send_signal(signal.SIGTERM)
        ended = [child.wait(timeout=90) for child in self.children]
        assert ended == [0] * len(ended), f"programs ended with {ended}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("cortex", type=pathlib.Path)
    parser.add_argument("neuron", type=pathlib.Path)
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--document", type=pathlib.Path, help="the OpenAI document; without it schemathesis does not run")
    parser.add_argument("--keep", type=pathlib.Path, help="where to install; a temporary folder by default")
    parser.add_argument("--examples", default="100", help="schemathesis' requests an operation")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep or pathlib.Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        python = folder / "venv/bin/python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        needed = ["openai"] + (["schemathesis"] if args.document else [])
        subprocess.run([python, "-m", "pip", "install", "-q", *needed], check=True)
        fleet = Fleet(pathlib.Path(temporary), args.cortex, args.neuron, args.model)
        try:
            subprocess.run([python, HERE / "openai_sdk.py", fleet.url + "/v1", "demo"], check=True)
            if shutil.which("npm"):
                for file in ["package.json", "package-lock.json", "openai_sdk.mjs"]:
                    shutil.copy(HERE / file, folder)
                subprocess.run(["npm", "ci", "--silent", "--no-audit"], cwd=folder, check=True)
                subprocess.run(["node", "openai_sdk.mjs", fleet.url + "/v1", "demo"], cwd=folder, check=True)
            else:
                print("SKIPPED: the Node SDK, for there is no npm", file=sys.stderr)
            if args.document:
                walk = [python, HERE / "walk.py", fleet.url, "demo", args.document.resolve(), args.examples]
                subprocess.run(walk, check=True)
        finally:
            fleet.stop()


if __name__ == "__main__":
    main()

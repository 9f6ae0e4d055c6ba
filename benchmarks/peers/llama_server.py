"""llama.cpp's own server, which comes as a library in the PyPI package ``xllamacpp``: this is the program around it.

``python benchmarks/peers/llama_server.py FILE --port PORT --name NAME`` serves a GGUF on loopback until SIGTERM. Its
slots share a batch, as llama.cpp's continuous batching does by default.
"""

from __future__ import annotations

import argparse
import signal
import threading


def serve(file: str, port: int, name: str, slots: int, context: int, threads: int) -> None:
    """Run until SIGTERM or SIGINT. ``context``: tokens of each of the ``slots``."""
    import xllamacpp  # type: ignore[import-untyped]

    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = file, {name}
    params.hostnames, params.port = ["127.0.0.1"], port
    params.n_ctx, params.n_parallel = context * slots, slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(0.5):  # a handler runs between two waits
        pass
    del server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    serve(given.file, given.port, given.name, given.slots, given.context, given.threads)


if __name__ == "__main__":
    main()

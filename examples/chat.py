"""Ask a language model, with and without an adapter."""

from __future__ import annotations

import argparse

import studio


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("question", nargs="?", default="Name three colours.")
    options.add_argument("--base", default="smollm2", help="smollm2 is fetched once (about 100 MB)")
    options.add_argument("--adapter", action="append", default=[], help="NAME or PATH, with :STRENGTH if not 1")
    options.add_argument("--max-tokens", type=int, default=64)
    chosen = options.parse_args()

    print("base:", studio.chat(chosen.question, base=chosen.base, max_tokens=chosen.max_tokens))
    if chosen.adapter:
        answer = studio.chat(chosen.question, chosen.adapter, base=chosen.base, max_tokens=chosen.max_tokens)
        print("with adapter:", answer)


if __name__ == "__main__":
    main()

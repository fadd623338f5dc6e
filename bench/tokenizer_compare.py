"""Compares flexchat's BPE training and encoding with rustbpe, tiktoken and Hugging Face tokenizers.

    python bench/tokenizer_compare.py build/cpu/flexchat /usr/share/doc /usr/include /usr/lib/python3

All programs get the same documents and the same number of threads, take turns in one run, and the figures are
medians of the rounds' ratios. Merges and ids must be identical: otherwise the exit code is 1.
- Training: flexchat's time runs from the first read of a JSON-lines file (parsing included) to the last merge;
  rustbpe's is train_from_iterator over strings in memory.
- Encoding: texts in memory to ids in memory. flexchat is a new process each round, so its caches start cold; the
  others keep theirs from round to round. Starting a process or building an encoder is counted for nobody.

Needs: pip install rustbpe tiktoken tokenizers numpy
"""

import argparse
import gzip
import hashlib
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version

PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL = 9  # special tokens that flexchat adds to the vocabulary
DOCUMENT_CHARACTERS = 10_000


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="the flexchat program")
    parser.add_argument("text", nargs="+", help="text files, or folders of them (.gz too)")
    parser.add_argument("--megabytes", type=float, default=60, help="use this much of the text")
    parser.add_argument("--min-megabytes", type=float, default=50, help="refuse to measure on less")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--out", help="result file; default bench/results/<cpu name>/tokenizer.json")
    return parser.parse_args()


def read_text(path):
    """The file as text, or None if it is not UTF-8 text of a reasonable size."""
    try:
        if os.path.getsize(path) > 1_000_000_000:
            return None
        data = gzip.open(path).read() if path.endswith(".gz") else open(path, "rb").read()
        return data.decode() if b"\0" not in data else None
    except (OSError, EOFError, UnicodeDecodeError):
        return None


def find_documents(words, megabytes):
    """Documents of at most DOCUMENT_CHARACTERS characters, cut at line ends, from distinct text files."""
    paths = []
    for word in words:
        if os.path.isdir(word):
            for folder, _, names in os.walk(word):
                paths += [os.path.join(folder, name) for name in names]
        else:
            paths.append(word)
    paths = [path for path in set(paths) if os.path.isfile(path) and not os.path.islink(path)]
    paths.sort(key=lambda path: hashlib.md5(path.encode()).digest())  # mixes the folders, the same way each time
    documents, seen, total = [], set(), 0
    for path in paths:
        text = read_text(path)
        digest = hashlib.md5(text.encode()).digest() if text else None
        if not text or digest in seen:
            continue
        seen.add(digest)
        begin = 0
        while begin < len(text):
            end = begin + DOCUMENT_CHARACTERS
            if end < len(text):
                end = max(text.rfind("\n", begin, end) + 1, begin + DOCUMENT_CHARACTERS // 2)
            documents.append(text[begin:end])
            total += len(documents[-1].encode())
            begin = end
            if total > megabytes * 1e6:
                return documents, total
    return documents, total


def timed(call):
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def run_program(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def merges_of(ranks):
    """The two tokens that made each token, in order of rank: what its bytes merge to with lower ranks alone."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
            best, i = min(pairs)
            if best >= rank:
                sys.exit(f"token {rank} cannot be made from two others")
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


def byte_letters():
    """The character that stands for each byte in Hugging Face's byte-level vocabularies."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters, extra = {byte: chr(byte) for byte in plain}, 0
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + extra)
            extra += 1
    return letters


def hugging_face(ranks):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    letters = byte_letters()
    word = lambda token: "".join(letters[byte] for byte in token)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={word(token): rank for token, rank in ranks.items()},
            merges=[(word(a), word(b)) for a, b in merges_of(ranks)],
            ignore_merges=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


class Comparison:
    """Alternating rounds of named calls that return seconds."""

    def __init__(self):
        self.seconds = {}

    def add(self, name, seconds):
        self.seconds.setdefault(name, []).append(seconds)
        print(f"  {name:<10} {seconds:8.3f} s", flush=True)

    def summary(self, megabytes):
        out = {}
        for name, list_of_seconds in self.seconds.items():
            out[name] = {
                "seconds": [round(s, 4) for s in list_of_seconds],
                "median_mb_per_s": round(megabytes / statistics.median(list_of_seconds), 2),
            }
            if name != "flexchat":
                ratios = [other / ours for other, ours in zip(list_of_seconds, self.seconds["flexchat"])]
                out[name]["flexchat_is_faster_by"] = round(statistics.median(ratios), 3)
                out[name]["ratios"] = [round(r, 3) for r in ratios]
        return out


def compare_training(a, documents, data, folder):
    import rustbpe

    comparison, identical, ranks = Comparison(), True, None
    for round_number in range(a.rounds):
        print(f"training, round {round_number + 1}")
        out = os.path.join(folder, "tokenizer")
        report = run_program(
            [a.program, "tokenizer", "train", "--data", data, "--split", "all", "--doc-cap", "0", "--max-chars", "0"]
            + ["--vocab-size", str(a.vocab_size), "--threads", str(a.threads), "--out", out, "--json"]
        )
        comparison.add("flexchat", report["count_seconds"] + report["merge_seconds"])
        trainer = rustbpe.Tokenizer()
        _, seconds = timed(
            lambda: trainer.train_from_iterator(iter(documents), a.vocab_size - SPECIAL, pattern=PATTERN)
        )
        comparison.add("rustbpe", seconds)
        theirs = [bytes(token).hex() for token, _ in trainer.get_mergeable_ranks()]
        ours = json.load(open(os.path.join(out, "tokenizer.json")))["tokens"]
        identical = identical and ours == theirs
        ranks = {bytes.fromhex(token): rank for rank, token in enumerate(theirs)}
    return comparison, identical, ranks


def compare_encoding(a, documents, data, folder, ranks):
    import numpy
    import tiktoken

    ranks_file, ids_file = os.path.join(folder, "ranks.json"), os.path.join(folder, "ids.bin")
    with open(ranks_file, "w") as file:
        json.dump({"pattern": PATTERN, "special": [], "ranks_hex": {t.hex(): r for t, r in ranks.items()}}, file)
    tik = tiktoken.Encoding(name="compare", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    face = hugging_face(ranks)
    comparison, identical, tokens = Comparison(), {"tiktoken": True, "tokenizers": True}, 0
    for round_number in range(a.rounds):
        print(f"encoding, round {round_number + 1}")
        report = run_program(
            [a.program, "tokenizer", "encode", "--ranks", ranks_file, "--data", data, "--split", "all"]
            + ["--threads", str(a.threads), "--out", ids_file]
        )
        comparison.add("flexchat", report["encode_seconds"])
        ours = numpy.fromfile(ids_file, dtype=numpy.int32)
        tokens = len(ours)

        rows, seconds = timed(lambda: tik.encode_ordinary_batch(documents, num_threads=a.threads))
        comparison.add("tiktoken", seconds)
        theirs = numpy.concatenate([numpy.array(row, dtype=numpy.int32) for row in rows])
        identical["tiktoken"] = identical["tiktoken"] and numpy.array_equal(ours, theirs)
        del rows

        rows, seconds = timed(lambda: face.encode_batch_fast(documents, add_special_tokens=False))
        comparison.add("tokenizers", seconds)
        theirs = numpy.concatenate([numpy.array(row.ids, dtype=numpy.int32) for row in rows])
        identical["tokenizers"] = identical["tokenizers"] and numpy.array_equal(ours, theirs)
        del rows
    return comparison, identical, tokens


def cpu_name():
    try:
        for line in open("/proc/cpuinfo"):
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git(root, *words):
    return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True).stdout.strip()


def main():
    a = parse_arguments()
    # Both libraries read this when they first start their threads.
    os.environ["RAYON_NUM_THREADS"] = str(a.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    documents, total = find_documents(a.text, a.megabytes)
    if total < a.min_megabytes * 1e6:
        sys.exit(f"only {total / 1e6:.1f} MB of text found; at least {a.min_megabytes} MB are wanted (--min-megabytes)")
    print(f"{len(documents)} documents, {total / 1e6:.1f} MB, {a.threads} threads")
    root = pathlib.Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        data = os.path.join(folder, "documents.jsonl")
        with open(data, "w") as file:
            for text in documents:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        training, merges_identical, ranks = compare_training(a, documents, data, folder)
        encoding, ids_identical, tokens = compare_encoding(a, documents, data, folder, ranks)

    corpus = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    result = {
        "command": " ".join(["python", "bench/tokenizer_compare.py", *sys.argv[1:]]),
        "git_commit": git(root, "rev-parse", "HEAD"),
        "git_dirty": bool(git(root, "status", "--porcelain")),
        "cpu": cpu_name(),
        "threads": a.threads,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("rustbpe", "tiktoken", "tokenizers")},
        },
        "corpus": {"documents": len(documents), "bytes": total, "tokens": tokens, "sha256": corpus},
        "vocab_size": a.vocab_size,
        "merges_identical": merges_identical,
        "ids_identical": ids_identical,
        "train": training.summary(total / 1e6),
        "encode": encoding.summary(total / 1e6),
    }
    folder_name = re.sub(r"[^A-Za-z0-9.-]+", "-", re.sub(r"\((R|TM)\)", "", cpu_name())).strip("-")
    out = pathlib.Path(a.out) if a.out else root / "bench" / "results" / folder_name / "tokenizer.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")

    print(f"\nmerges identical: {merges_identical}; ids identical: {ids_identical}")
    print(f"training: {result['train']['rustbpe']['flexchat_is_faster_by']:.2f} x rustbpe")
    for name in ("tiktoken", "tokenizers"):
        print(f"encoding: {result['encode'][name]['flexchat_is_faster_by']:.2f} x {name}")
    print(f"written: {out}")
    return 0 if merges_identical and all(ids_identical.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

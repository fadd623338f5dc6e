#!/usr/bin/env python3
"""Attention beside PyTorch on the CPU: F.scaled_dot_product_attention, causal, forward and backward, in f32.

usage: attention_vs_torch.py --flexchat build/cpu/flexchat --out FILE.json [--shape 1x8x8x1024x64] [--rounds 7]
       [--threads 2] [--torch-python PYTHON]

Ours is `flexchat bench attention --mods sdpa flex`: the built-in causal mask, and the same mask as an expression.
PyTorch's forward keeps what its backward needs, as ours does; its backward is autograd's. The two programs run in
turn, so that a drift of the machine's speed meets both; times are medians, ratios medians of the ratios pair by pair.
"""
import argparse, json, os, platform, statistics, subprocess, sys, tempfile

TORCH = """
import json, sys, time, torch
import torch.nn.functional as F
b, h, g, t, d, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
q, k, v = (torch.empty(b, n, t, d).uniform_(-1.7, 1.7).requires_grad_() for n in (h, g, g))
dout = torch.empty(b, h, t, d).uniform_(-1.7, 1.7)
forward, backward = [], []
for _ in range(60):
    start = time.perf_counter()
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=h != g)
    middle = time.perf_counter()
    torch.autograd.grad(out, (q, k, v), dout)
    forward.append(middle - start)
    backward.append(time.perf_counter() - middle)
median = lambda x: 1e3 * sorted(x[10:])[len(x[10:]) // 2]
print(json.dumps(dict(version=torch.__version__, forward_ms=median(forward), backward_ms=median(backward))))
"""

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--flexchat", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--shape", default="1x8x8x1024x64", help="batch, query heads, key heads, tokens, head dim")
parser.add_argument("--rounds", type=int, default=7)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--torch-python", default=sys.executable, help="the Python that has PyTorch")
args = parser.parse_args()


def torch_run():
    command = [args.torch_python, "-c", TORCH, *args.shape.split("x"), str(args.threads)]
    env = dict(os.environ, OMP_NUM_THREADS=str(args.threads))
    return json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)


def flexchat_run():
    with tempfile.TemporaryDirectory() as runs:
        command = [args.flexchat, "bench", "attention", "--device", "cpu", "--dtype", "f32", "--threads", str(args.threads),
                   "--shapes", args.shape, "--mods", "sdpa", "flex", "--repeats", "30", "--json", "--runs", runs]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {row["mod"]: row for row in result["rows"]}


def git(*words):
    return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()


rounds = []
for i in range(args.rounds):
    ours, torch = flexchat_run(), torch_run()
    rounds.append((ours, torch))
    show = lambda row: f"{row['forward_ms']:.2f} + {row['backward_ms']:.2f} ms"
    print(f"round {i + 1}: sdpa {show(ours['sdpa'])}   flex {show(ours['flex'])}   torch {show(torch)}", flush=True)

result = dict(
    command=" ".join(["python3", "bench/attention_vs_torch.py"] + [a if "/" not in a else os.path.basename(a) for a in sys.argv[1:]]),
    commit=git("rev-parse", "HEAD"), dirty=bool(git("status", "--porcelain")),
    cpu=next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.processor()),
    threads=args.threads, torch=rounds[0][1]["version"], rounds=args.rounds, shape=args.shape, mask="causal", dtype="f32",
    torch_sdpa={key: statistics.median(r[1][key] for r in rounds) for key in ("forward_ms", "backward_ms")})
for mod in ("sdpa", "flex"):
    result[mod] = {}
    for way in ("forward", "backward"):
        key = way + "_ms"
        result[mod][key] = statistics.median(r[0][mod][key] for r in rounds)
        result[mod][way + "_ratio"] = statistics.median(r[1][key] / r[0][mod][key] for r in rounds)
with open(args.out, "w") as f:
    json.dump(result, f, indent=1)
    f.write("\n")
print(json.dumps(result, indent=1))

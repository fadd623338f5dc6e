#!/usr/bin/env python3
"""flexchat beside PyTorch on one CPU: forward + backward and single-stream decode of the same model shape.

usage: cpu_vs_torch.py --peers TORCH_PEERS.py --flexchat build/cpu/flexchat --out FILE.json [--rounds 5] [--threads 2]

TORCH_PEERS.py is a script whose section `cpu` prints cpu_train_..._tok_s and cpu_decode_..._tok_s (the classic d4
model: width 256, 2 heads, vocabulary 4096, 8 rows of 256 tokens, float32). The two programs run in turn, so that a
drift of the machine's speed meets both; figures are medians, ratios are medians of the ratios pair by pair.
"""
import argparse, json, os, platform, re, statistics, subprocess, sys, tempfile

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--peers", required=True)
ap.add_argument("--flexchat", required=True)
ap.add_argument("--out", required=True)
ap.add_argument("--rounds", type=int, default=5)
ap.add_argument("--threads", type=int, default=2)
args = ap.parse_args()


def torch_run():
    env = dict(os.environ, OMP_NUM_THREADS=str(args.threads))
    text = subprocess.run([sys.executable, args.peers, "cpu"], env=env, check=True, capture_output=True, text=True).stdout
    number = lambda key: float(re.search(rf"{key}\S*\s+([\d.]+)", text).group(1))
    return dict(train=number("cpu_train_"), decode=number("cpu_decode_"), version=re.search(r"torch\s+(\S+)", text).group(1))


def flexchat_run(dtype):
    with tempfile.TemporaryDirectory() as runs:
        cmd = [args.flexchat, "bench", "model", "--dtype", dtype, "--threads", str(args.threads), "--json", "--runs", runs]
        return json.loads(subprocess.run(cmd, check=True, capture_output=True, text=True).stdout)


def median(values):
    return statistics.median(values)


def git(*words):
    return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()


rounds = []
for i in range(args.rounds):
    f32, torch, bf16 = flexchat_run("f32"), torch_run(), flexchat_run("bf16")
    rounds.append((f32, torch, bf16))
    print(f"round {i + 1}: train f32 {f32['fwd_bwd_tok_s']:.0f}  bf16 {bf16['fwd_bwd_tok_s']:.0f}  torch {torch['train']:.0f}   "
          f"decode f32 {f32['decode_tok_s']:.0f}  bf16 {bf16['decode_tok_s']:.0f}  torch {torch['decode']:.0f}", flush=True)

result = dict(
    command=" ".join(["python3", "bench/cpu_vs_torch.py"] + [a if "/" not in a else os.path.basename(a) for a in sys.argv[1:]]),
    commit=git("rev-parse", "HEAD"), dirty=bool(git("status", "--porcelain")),
    cpu=next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.processor()),
    threads=args.threads, torch=rounds[0][1]["version"], rounds=args.rounds,
    shape="classic d4, width 256, 2 heads of 128, vocabulary 4096, batch 8 x 256 tokens; decode batch 1, prompt 64, 200 tokens")
for dtype, k in (("f32", 0), ("bf16", 2)):
    result[dtype] = dict(
        train_tok_s=median([r[k]["fwd_bwd_tok_s"] for r in rounds]), train_ratio=median([r[k]["fwd_bwd_tok_s"] / r[1]["train"] for r in rounds]),
        decode_tok_s=median([r[k]["decode_tok_s"] for r in rounds]), decode_ratio=median([r[k]["decode_tok_s"] / r[1]["decode"] for r in rounds]),
        activation_peak_mb=rounds[0][k]["activation_peak_mb"], activation_peak_checkpoint_mb=rounds[0][k]["activation_peak_checkpoint_mb"],
        checkpoint_tok_s=median([r[k]["fwd_bwd_checkpoint_tok_s"] for r in rounds]))
result["torch_f32"] = dict(train_tok_s=median([r[1]["train"] for r in rounds]), decode_tok_s=median([r[1]["decode"] for r in rounds]))
with open(args.out, "w") as f:
    json.dump(result, f, indent=1)
    f.write("\n")
print(json.dumps(result, indent=1))

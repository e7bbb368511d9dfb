#!/usr/bin/env python3
"""What the README promises of the quickstart, checked on a store in which it has run.

    python3 .ci/quickstart.py target/release/rlflow STORE [seed=N]
"""

import json
import subprocess
import sys
import time

binary, store, sets = sys.argv[1], sys.argv[2], sys.argv[3:]
arguments = ["workflows/quickstart.toml", "--store", store, "--json", *(part for value in sets for part in ("--set", value))]


def rlflow(command: str) -> str:
    return subprocess.run([binary, command, *arguments], check=True, capture_output=True, text=True).stdout


stages = json.loads(rlflow("metrics"))["stages"]
final = {name: stage["final"] for name, stage in stages.items()}
scores = final["eval"]
for model in ("pretrain", "sft", "ppo", "dpo"):
    print(f"{model:9}", "  ".join(f"{name} {scores[f'{model}/{name}']:.3f}" for name in ("rule_score", "reward", "win_rate", "kl")))
accuracy = final["reward_model"]["eval/accuracy"]
print(f"reward model ranks {accuracy:.1%} of held-out pairs right")

assert accuracy >= 0.90, "the reward model ranks fewer than 90% of held-out pairs right"
assert scores["sft/rule_score"] >= scores["pretrain/rule_score"] + 0.10, "SFT is not clearly better than the base model"
for model in ("ppo", "dpo"):
    assert scores[f"{model}/rule_score"] >= scores["sft/rule_score"] + 0.10, f"{model} is not 10 points better than SFT"
errors = [value for _, value in stages["ppo"]["series"]["policy/first_ratio_error"]]
assert errors and not any(errors), "the first minibatch's ratio is not exactly 1"

start = time.monotonic()
last = json.loads(rlflow("run").splitlines()[-1])
seconds = time.monotonic() - start
print(f"a second run took {seconds * 1000:.0f} ms")
assert all(stage["status"] == "cached" for stage in last["stages"]), "the second run was not all cached"

"""The other side of `speed`: PyTorch, transformers and TRL on the same models, batches and lengths.

Run by main.rs, which asks for one measurement per line of JSON and gets one line back: `seconds` (of each step, warm-up left out) or
`error`. It is one long-lived process, so that torch is loaded and compiled code is made once; between requests it waits.

    peers.py --threads N                        answers requests
    peers.py --threads N --peak-memory REQUEST  trains for a few steps and says this process's peak resident memory
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from unittest import mock

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback

# TRL comes with much that training a model does not need: it is imported where it is used, so that it is in no peak.


def llama_config(model):
    """The same network; what rlflow has not (dropout, biases) is off by default."""
    return LlamaConfig(
        vocab_size=model["vocab_size"],
        hidden_size=model["hidden_size"],
        intermediate_size=model["intermediate_size"],
        num_hidden_layers=model["layers"],
        num_attention_heads=model["heads"],
        num_key_value_heads=model["kv_heads"],
        max_position_embeddings=model["context"],
        rms_norm_eps=model["norm_eps"],
        tie_word_embeddings=model["tie_embeddings"],
        # Nothing ends an answer, and no id of the vocabulary is padding.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="sdpa",
    )


def policy(model):
    return LlamaForCausalLM(llama_config(model)).float()


def scorer(model):
    config = llama_config(model)
    config.num_labels = 1
    return LlamaForSequenceClassification(config).float()


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def random_ids(model, rows, width):
    return torch.randint(2, model["vocab_size"], (rows, width))


class Train:
    """Forward, backward, clipping and AdamW (torch's fused one) on one batch; every token is a target."""

    def __init__(self, request):
        self.model = policy(request["model"]).train()
        ids = random_ids(request["model"], request["batch"], request["length"] + 1)
        self.ids, self.targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        self.bf16 = request["mode"] == "bf16"
        self.loss = torch.compile(self.plain_loss) if request["mode"] == "compile" else self.plain_loss
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
        )

    def plain_loss(self, ids, targets):
        logits = self.model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def step(self):
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            loss = self.loss(self.ids, self.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def measure(self, steps):
        return {"parameters": parameters(self.model), "seconds": [self.step() for _ in range(steps)]}


class Generate:
    """transformers' generate with its cache: samples from the whole vocabulary, nothing ends early."""

    def __init__(self, request):
        self.model = policy(request["model"]).eval()
        self.prompts = random_ids(request["model"], request["batch"], request["prompt"])
        self.new = request["new"]

    def step(self):
        start = time.perf_counter()
        with torch.no_grad():
            answers = self.model.generate(
                input_ids=self.prompts,
                attention_mask=torch.ones_like(self.prompts),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                use_cache=True,
                min_new_tokens=self.new,
                max_new_tokens=self.new,
                pad_token_id=0,
            )
        seconds = time.perf_counter() - start
        assert answers.shape == (len(self.prompts), self.prompts.shape[1] + self.new), answers.shape
        return seconds

    def measure(self, steps):
        return {"parameters": parameters(self.model), "seconds": [self.step() for _ in range(steps)]}


class Clock(TrainerCallback):
    """When each step of a trainer ended."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *args, **kwargs):
        self.ends.append(time.perf_counter())

    def seconds(self):
        """Of every step but the first, which is the warm-up."""
        return [end - start for start, end in zip(self.ends, self.ends[1:])]


def tokenizer(vocab_size, pad_id, eos_id):
    """One word, one token: "t17" is 17."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {f"t{i}": i for i in range(vocab_size) if i not in (pad_id, eos_id)} | {"<pad>": pad_id, "</s>": eos_id}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


QUIET = {
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "optim": "adamw_torch_fused",
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "logging_steps": 1_000_000,
}


class Ppo:
    """TRL's PPOTrainer with four models: rollout, scoring and all epochs, one minibatch. No answer ends early."""

    def __init__(self, request):
        self.request = request

    def measure(self, steps):
        from datasets import Dataset
        from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

        request, model = self.request, self.request["model"]
        generation = ppo_trainer.batch_generation

        def checked_generation(*args):
            rows, logits = generation(*args)
            assert rows.shape == (request["batch"], request["prompt"] + request["new"]), rows.shape
            return rows, logits

        batch, clock = request["batch"], Clock()
        dataset = Dataset.from_list([{"input_ids": ids} for ids in random_ids(model, batch, request["prompt"]).tolist()])
        # Padding is outside of the vocabulary: no sampled token can be taken for it.
        tokens = tokenizer(model["vocab_size"], model["vocab_size"], model["vocab_size"] + 1)
        tokens.padding_side = "left"
        actor = policy(model)
        with tempfile.TemporaryDirectory() as folder:
            config = PPOConfig(
                output_dir=folder,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=1,
                num_mini_batches=1,
                num_ppo_epochs=request["epochs"],
                total_episodes=batch * (steps + 1),
                local_rollout_forward_batch_size=batch,
                response_length=request["new"],
                temperature=1.0,
                stop_token=None,
                num_sample_generations=0,
                learning_rate=3e-6,
                **QUIET,
            )
            trainer = PPOTrainer(
                args=config,
                processing_class=tokens,
                model=actor,
                ref_model=policy(model).eval(),
                reward_model=scorer(model).eval(),
                value_model=scorer(model),
                train_dataset=dataset,
                eval_dataset=dataset,
                callbacks=[clock],
            )
            with mock.patch.object(ppo_trainer, "batch_generation", checked_generation):
                trainer.train()
        return {"parameters": parameters(actor), "seconds": clock.seconds()}


class Dpo:
    """TRL's DPOTrainer; the reference is computed in the step."""

    def __init__(self, request):
        self.request = request

    def measure(self, steps):
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        request, model = self.request, self.request["model"]
        batch, prompt, length, clock = request["batch"], request["prompt"], request["length"], Clock()
        words = lambda ids: " ".join(f"t{i}" for i in ids)
        # The trainer ends both answers with EOS.
        rows = random_ids(model, batch * (steps + 1), prompt + 2 * (length - prompt - 1)).tolist()
        cut = length - 1
        dataset = Dataset.from_list(
            [{"prompt": words(row[:prompt]), "chosen": " " + words(row[prompt:cut]), "rejected": " " + words(row[cut:])} for row in rows]
        )

        class Checked(DPOTrainer):
            def compute_loss(self, model, inputs, *args, **kwargs):
                assert inputs["input_ids"].shape == (2 * batch, length), inputs["input_ids"].shape
                return super().compute_loss(model, inputs, *args, **kwargs)

        trained = policy(model)
        with tempfile.TemporaryDirectory() as folder:
            config = DPOConfig(
                output_dir=folder,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=1,
                max_steps=steps + 1,
                max_length=model["context"],
                beta=0.1,
                learning_rate=1e-6,
                **QUIET,
            )
            trainer = Checked(
                model=trained,
                ref_model=policy(model),
                args=config,
                train_dataset=dataset,
                processing_class=tokenizer(model["vocab_size"], 0, 1),
                callbacks=[clock],
            )
            trainer.train()
        return {"parameters": parameters(trained), "seconds": clock.seconds()}


class Data:
    """Documents, one a line, to packed ids in a file, with all threads of `tokenizers`."""

    # As much text at once as rlflow takes.
    BATCH_CHARACTERS = 8 << 20

    def __init__(self, request):
        # Both are read when the first batch is encoded.
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        os.environ["RAYON_NUM_THREADS"] = str(request["threads"])
        from tokenizers import Tokenizer

        self.request, self.tokenizer = request, Tokenizer.from_file(request["tokenizer"])

    def batches(self, lines):
        batch, characters = [], 0
        for line in lines:
            batch.append(line.rstrip("\n"))
            characters += len(line)
            if characters >= self.BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch

    def step(self):
        import numpy

        end, tokens, start = self.request["end"], 0, time.perf_counter()
        with open(self.request["text"], encoding="utf-8", newline="\n") as lines, open(self.request["ids"], "wb") as out:
            for batch in self.batches(lines):
                ids = []
                for encoding in self.tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                    ids += encoding.ids
                    ids.append(end)
                tokens += len(ids)
                out.write(numpy.array(ids, dtype=numpy.uint32).tobytes())
        return time.perf_counter() - start, tokens

    def measure(self, steps):
        measured = [self.step() for _ in range(steps)]
        return {"tokens": measured[0][1], "seconds": [seconds for seconds, _ in measured]}


TASKS = {"train": Train, "generate": Generate, "ppo": Ppo, "dpo": Dpo, "data": Data}


def peak_resident_bytes():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def answer(setups, request):
    steps = request.pop("steps")
    key = json.dumps(request, sort_keys=True)
    if key not in setups:
        kept = {name: setup for name, setup in setups.items() if json.loads(name)["model"] == request["model"]}
        setups.clear()
        setups.update(kept)
        setups[key] = TASKS[request["task"]](request)
    return setups[key].measure(steps)


def serve(channel):
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    try:
        from importlib.metadata import version

        versions["trl"] = version("trl")
    except ImportError:
        pass
    print(json.dumps({"versions": versions, "threads": torch.get_num_threads()}), file=channel, flush=True)
    setups = {}
    for line in sys.stdin:
        try:
            reply = answer(setups, json.loads(line))
        except Exception as error:  # What fails here is one cell of the table.
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(reply), file=channel, flush=True)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--threads", type=int, required=True)
    arguments.add_argument("--peak-memory", type=json.loads)
    arguments = arguments.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)
    # Trainers print: only answers go to our stdout.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if arguments.peak_memory:
        Train(arguments.peak_memory).measure(3)
        print(json.dumps({"bytes": peak_resident_bytes()}), file=channel, flush=True)
    else:
        serve(channel)


if __name__ == "__main__":
    main()

"""Writes the seeds: small inputs of every shape that the targets know.

pip install pyarrow blake3; last run with pyarrow 26.0.
"""

import gzip
import json
import struct
from pathlib import Path

import blake3
import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent


def seed(target: str, name: str, content: bytes | str) -> None:
    content = content.encode() if isinstance(content, str) else content
    assert len(content) <= 4096, (target, name, len(content))
    (HERE / target).mkdir(exist_ok=True)
    (HERE / target / name).write_bytes(content)


def digest(content: bytes) -> str:
    return blake3.blake3(content).hexdigest()


# Workflows.
CHAIN = """name = "chain"
edition = 1
seed = 7

[defaults]
device = "cpu"

[stage.corpus]
kind = "corpus"
sources = [{ path = "data/*.txt", weight = 0.6 }, { path = "data/a.txt", weight = 0.4 }]

[stage.tokenizer]
kind = "tokenizer"
inputs = { corpus = "corpus" }
vocab_size = 300
special_tokens = ["<x>", '''y''']

[stage.base]
kind = "pretrain"
inputs = { corpus = "corpus.text", tokenizer = "tokenizer" }
train = { steps = 10, lr = 1e-3, schedule = { decay = 0.2 }, betas = [0.9, 0.95] }
sizes = { a = 1, "b c" = -2 }
"""
seed("workflow", "chain.toml", CHAIN)
seed("workflow", "matrix.toml", CHAIN + 'matrix = { "train.lr" = [1e-3, 2e-3], shuffle = [true, false] }\n\n'
     '[stage.eval]\nkind = "eval"\ninputs = { models = ["base[*]", "base[shuffle=true,train.lr=0.001]"] }\nmax_new_tokens = 0x10\n')
seed("workflow", "include.toml", 'include = ["part.toml"]\n[stage.base]\nkind = "pretrain"\ninputs = { corpus = "corpus", model = "base" }\n'
     '#%set stage.base.train.lr=0.5\n#%set defaults.device=["cuda:0", { cpu = 4 }]\n#%part\n'
     '[stage.corpus]\nkind = "corpus"\nsources = [{ path = "data/a.txt" }]\nheldout = 0.1\n[stage.corpus]\n')
seed("workflow", "wrong.toml", '[stage.a]\nkind = "corpsu"\n[stage."b c"]\nkind = 1979-05-27\n[stage.c]\nkind = "eval"\n'
     'inputs = { models = [] , modles = "c" }\n[stage.d]\nkind = "pretrain"\ninputs.corpus = "d"\nzero = "x"\noffload = "disk"\n')

# Manifests and actions.
entry = {"digest": digest(b"rlflow"), "name": "model.weight", "size_bytes": 6}
tensor = {"digest": digest(b""), "dtype": "bf16", "name": "note/a.txt", "shape": [0, 4], "size_bytes": 0}
canonical = lambda value: json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
seed("manifest", "two.json", canonical({"artifact_type": "policy", "entries": [entry, tensor], "format": 1, "metadata": {"rows": {"train": 1}}}))
seed("manifest", "none.json", canonical({"artifact_type": "text", "entries": [], "format": 1, "metadata": None}))
seed("manifest", "outside.json", canonical({"artifact_type": "text", "entries": [dict(entry, name="../../x")], "format": 1, "metadata": []}))
record = {
    "format": 1, "key": digest(b"fuzz"), "full_key": {"kind": "sft", "settings": {"lr": 1e-3}}, "outputs": {"model": digest(b"a")},
    "metrics": {"loss": 0.5, "nan": "NaN", "inf": "-inf"}, "records": {"series": digest(b"b")},
    "provenance": {"stage": "sft", "kind": "sft", "workflow": "w.toml", "run_id": "r", "host": "h", "started_at": 1.5, "duration_seconds": 2,
                   "rlflow_version": "0.1.0", "devices": ["cpu"], "numerics": "avx2", "resumed_from_step": 3, "adopted": False, "settings": {"a": [1]},
                   "inputs": {"data": [["d", digest(b"d")]]}, "files": [["f", digest(b"f")]], "measurements": {"tokens_per_s": 1}},
}
seed("action", "whole.json", canonical(record))
seed("action", "short.json", canonical(dict(record, provenance={}, metrics={}, records={}, outputs={})))
seed("action", "sealed", f"rlflow-action 1 {digest(canonical(record).encode())}\n{canonical(record)}")
seed("action", "broken", f"rlflow-action 1 {digest(b'other')}\n{canonical(record)}")

# Data files; the first byte is format + 6 * packing + 30 * split.
FORMATS = ["txt", "html", "jsonl", "json", "csv", "tsv"]
ROWS = [
    {"text": "a\u0000é\U0001f600", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s", "prompt": "q", "completion": "a"},
    {"instruction": "i", "input": "j", "output": "k", "history": [["a", "b"]], "chosen": "x", "rejected": "y", "margin": 1e3},
    {"prompt": "q", "answers": ["a", "b", "c"], "scores": [1, 3, 2], "answer": "x # 42"},
    {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: a\n\nAssistant: y"},
]
CONTENTS = {
    "txt": "\ufeffone\r\ntwo\n\n\nthree\n",
    "html": "<!DOCTYPE html><title>t</title><body><h1 class='x'>A &amp; B&nbsp;&#x41;&notit;</h1><p>p<br>q<script>a<b</script><pre>\n x\n</pre>"
            "<table><tr><td>1<td>2</table><ul><li>a<li>b</ul><svg/><svg><g></svg><!-- c --><![CDATA[x]]><textarea><p></textarea>",
    "jsonl": "\n".join(json.dumps(row) for row in ROWS),
    "json": json.dumps(ROWS, indent=1),
    "csv": 'prompt,chosen,rejected,text\r\nq,"a, ""b""\nc",d,\n\ne,f,g,h\n',
    "tsv": "instruction\tinput\toutput\ta\ti\n1\t2\t3\t\t5\n",
}
for number, name in enumerate(FORMATS):
    content = CONTENTS[name].encode()
    seed("data_file", name, bytes([number + 60]) + content)
    seed("data_file", f"{name}.gz", bytes([number + 6]) + gzip.compress(content, mtime=0))
    seed("data_file", f"{name}.packed", bytes([number + 18 + 30 * (number % 2)]) + content)
    packed = pa.compress(content, codec="zstd", asbytes=True)
    seed("data_file", f"{name}.zst", bytes([number + 12 + 30]) + packed)

# Parquet: few columns, so that files stay small.
struct_type = pa.struct([("role", pa.string()), ("content", pa.string())])
rows = [{"text": None if i % 3 == 0 else f"text {i % 2}", "n": i, "x": i / 2, "b": i % 2 == 0,
         "m": [{"role": "user", "content": str(i)}] * (i % 3) if i % 4 else None} for i in range(9)]
table = pa.Table.from_pylist(rows, schema=pa.schema([("text", pa.string()), ("n", pa.int32()), ("x", pa.float64()), ("b", pa.bool_()), ("m", pa.list_(struct_type))]))
small = {"store_schema": False, "write_statistics": False}
encodings = {"n": "DELTA_BINARY_PACKED", "x": "BYTE_STREAM_SPLIT", "b": "RLE", "text": "DELTA_LENGTH_BYTE_ARRAY"}
for name, options in {
    "snappy": {"compression": "snappy"},
    "zstd_v2": {"compression": "zstd", "data_page_version": "2.0"},
    "gzip": {"compression": "gzip", "use_dictionary": False},
    "delta": {"compression": "none", "use_dictionary": False, "column_encoding": encodings},
    "prefix": {"compression": "none", "use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}, "row_group_size": 5},
}.items():
    path = HERE / "parquet" / name
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path, **small, **options)
    assert path.stat().st_size <= 4096, (name, path.stat().st_size)
pq.write_table(pa.table({"text": ["a", "a", None]}), HERE / "parquet" / "plain", **small, compression="none")
pq.write_table(pa.table({"k": pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int32()))}), HERE / "parquet" / "map", **small, compression="none")

# Tokenizers.
TOKENIZER = {"version": "1.0", "added_tokens": [{"id": 3, "content": "<s>", "special": True}], "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}
seed("tokenizer", "tokenizer.json", json.dumps(TOKENIZER))
seed("tokenizer", "unigram.json", json.dumps({"model": {"type": "Unigram", "vocab": [["a", -1.5], ["b", -2.0]]}}))
seed("tokenizer", "config.json", json.dumps({"eos_token": "</s>", "pad_token": {"content": "<pad>"}, "chat_template": [{"name": "default", "template": "{{ x }}"}]}))

# Safetensors.
def safetensors(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


seed("safetensors", "two", safetensors({"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
                                        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [8, 14]}}, bytes(14)))
seed("safetensors", "none", safetensors({}, b""))
seed("safetensors", "overlap", safetensors({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}}, bytes(6)))

# Configs of checkpoints.
HF = {"vocab_size": 600, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
      "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_act": "silu"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
seed("hf_config", "llama", json.dumps(HF | {"architectures": ["LlamaForCausalLM"], "rope_scaling": LLAMA3, "attention_bias": True}))
seed("hf_config", "mistral", json.dumps(HF | {"architectures": ["MistralForSequenceClassification"], "sliding_window": 8, "id2label": {"0": "a"}}))
seed("hf_config", "qwen3", json.dumps(HF | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 8, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}))
seed("hf_config", "gpt2", json.dumps({"architectures": ["GPT2LMHeadModel"], "vocab_size": 600, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}))

"""Invalid input from users and broken disks. Every case must end with one message and without training."""

import gzip
import json
import tempfile

from tests.launching import ROOT
from tests.reliability.spoiling import (
    ASKED,
    CHATML,
    EMBEDDING,
    GOOD,
    LINE,
    NORM,
    TOKENIZER,
    Case,
    bert,
    both,
    chat,
    checkpoint,
    config,
    data,
    deepspeed,
    evil_optimizer,
    filled,
    flags,
    long_line,
    model,
    parquet,
    pickled,
    reshaped,
    said,
    settings,
    swapped,
    template,
    tensors,
    truncated,
    without,
)

ZERO3 = ROOT / "ds_config/zero3.json"
ZERO2 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2},
}

DATA = [
    data("data-empty-file", "a.jsonl", b"", "a.jsonl:1: there is no conversation in this file"),
    data("data-blank-lines", "a.jsonl", b"\n \n\t\n", "a.jsonl:1: there is no conversation"),
    data("data-empty-array", "a.json", b"[]", "a.json:1: there is no conversation"),
    data("data-no-json", "a.jsonl", b"hello\n", "a.jsonl:1: broken JSON"),
    data("data-cut-line", "a.jsonl", LINE + LINE[:40], "a.jsonl:2: broken JSON"),
    data("data-cut-array", "a.json", b"[" + LINE, r"a.json:\d: broken JSON array"),
    data("data-utf16", "a.jsonl", LINE.decode().encode("utf-16"), "a.jsonl:1: not valid UTF-8"),
    data("data-bom-alone", "a.jsonl", b"\xef\xbb\xbf", "a.jsonl:1: there is no conversation"),
    data("data-nul-bytes", "a.jsonl", LINE + b"\0" * 100 + b"\n", "a.jsonl:2: broken JSON"),
    data("data-latin-1", "a.jsonl", LINE.replace(b"1 +", b"\xe9"), "a.jsonl:1: not valid UTF-8"),
    data(
        "data-gzip-cut",
        "a.jsonl.gz",
        lambda: gzip.compress(LINE * 999)[:-20],
        "stream is damaged or truncated",
    ),
    data("data-gzip-that-is-none", "a.jsonl.gz", LINE, "a.jsonl.gz:1: the gzip stream is damaged"),
    data("data-zstd-that-is-none", "a.jsonl.zst", LINE, "a.jsonl.zst:1: the zstd stream is damaged"),
    data(
        "data-parquet-cut", "a.parquet", parquet({"prompt": ["q"] * 99}, -30), "the parquet file is damaged"
    ),
    data(
        "data-parquet-columns", "a.parquet", parquet({"body": ["q"]}), "no conversation; the columns are body"
    ),
    data("data-unknown-suffix", "a.xls", LINE, "a.xls: expected a file that ends in"),
    data("data-300-mb-line", "a.jsonl", long_line, "a.jsonl:1: longer than 256 MiB"),
    data(
        "data-repeated-key",
        "a.jsonl",
        b'{"messages": [], "messages": []}',
        "the key 'messages' appears twice",
    ),
    data("data-100000-brackets", "a.jsonl", b"[" * 100_000 + b"\n", r"a.jsonl:\d: broken JSON"),
    data("data-nested-deeply", "a.jsonl", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    data(
        "data-huge-number",
        "a.jsonl",
        b'{"messages": 1' + b"0" * 9999 + b"}",
        "a number of thousands of digits",
    ),
    data("data-unknown-role", "a.jsonl", chat(ASKED, ("robot", "a")), "unknown role 'robot'; the roles are"),
    data("data-empty-turn", "a.jsonl", chat(ASKED, ("assistant", "")), "empty assistant turn"),
    data("data-no-assistant", "a.jsonl", chat(ASKED), "no assistant turn, so there is nothing to learn"),
    data(
        "data-content-number",
        "a.jsonl",
        chat(ASKED, ("assistant", 3)),
        "'content' must be a string, got a num",
    ),
    data(
        "data-image-part",
        "a.jsonl",
        chat(("user", [{"type": "image", "path": "/etc/passwd"}]), ("assistant", "a")),
        "must be a text part, got a part of type 'image'",
    ),
    data(
        "data-messages-string",
        "a.jsonl",
        b'{"messages": "hi"}\n',
        "'messages' must be a list of at least one",
    ),
    data("data-half-surrogate", "a.jsonl", LINE.replace(b"1 +", b"\\ud800"), "half a surrogate pair"),
    Case("data-missing", lambda ground: {"data_files": ground.folder / "no.jsonl"}, "no.jsonl: no such file"),
    Case(
        "data-empty-folder",
        lambda ground: {"data_files": tempfile.mkdtemp(dir=ground.folder)},
        "is a folder that holds no file ending in",
    ),
    Case("data-device", lambda _: {"data_files": "/dev/null"}, "/dev/null: is not a regular file"),
    Case(
        "data-pattern", lambda ground: {"data_files": ground.folder / "*.x"}, "no file matches this pattern"
    ),
]

TEMPLATES = [
    template(
        "template-raises", "{{ raise_exception('not today') }}", "the chat template refuses .* not today"
    ),
    template("template-syntax", "{% if %}", "t.jinja:1: not valid Jinja"),
    template("template-empty", " \n", "t.jinja: the file is empty"),
    Case(
        "template-latin-1",
        lambda ground: {"chat_template": ground.file("t.jinja", b"{{ '\xe9' }}")},
        "t.jinja: not valid UTF-8",
    ),
    Case(
        "template-missing", lambda _: {"chat_template": "no.jinja"}, "--chat_template no.jinja: no such file"
    ),
    Case("template-folder", lambda ground: {"chat_template": ground.folder}, "cannot be read"),
    template(
        "template-loops",
        "{% set r = range(99999) %}" + "{% for i in r %}" * 3 + "{% endfor %}" * 3,
        "t.jinja: it computes more than 10 seconds",
    ),
    template("template-one-endless-operation", "{{ 10 ** (10 ** 9) }}", "computes more than 10 seconds"),
    template(
        "template-loops-on-some-data",
        CHATML + "{% if '1' in messages[0].content %}{{ 10 ** (messages | length * 10 ** 9) }}{% endif %}",
        r"a.jsonl, lines 1 to 2: the chat template computes more than 10 seconds",
    ),
    template(
        "template-emits-without-end",
        "{% set r = range(7000) %}{% for i in r %}{{ 'aaaaaaaaaa' * 1000 }}{% endfor %}",
        "writes more than 64 million characters",
    ),
    template("template-takes-all-memory", "{{ 'a' * 10 ** 12 }}", "takes more than 2 GiB of memory"),
    template(
        "template-doubles",
        "{% set n = namespace(s='a') %}{% for i in range(27) %}{% set n.s = n.s * 2 %}{% endfor %}{{ n.s }}",
        "writes more than 64 million characters",
    ),
    template("template-recursion", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    template("template-class", "{{ ''.__class__.__mro__ }}", "access to attribute '__class__' .* is unsafe"),
    template("template-globals", "{{ raise_exception.__globals__.os }}", "'__globals__' .* is unsafe"),
    template("template-format-escape", "{{ '{0.__class__.__mro__}'.format(1) }}", "'__class__' .* is unsafe"),
    template(
        "template-includes", "{% include '/etc/passwd' %}", "the chat template fails on the conversation"
    ),
    template("template-unknown-filter", "{{ messages | shell }}", "No filter named 'shell'"),
    template(
        "template-brackets",
        "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
        "too many nested blocks",
    ),
    template(
        "template-blocks",
        "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
        "too many nested blocks",
    ),
    template(
        "template-without-content",
        "{% for m in messages %}{{ m.role }}{% endfor %}",
        "does not render the content of user turns",
    ),
]

MODELS = [
    model("model-truncated-weights", truncated, "cannot be loaded: SafetensorError"),
    model(
        "model-weights-no-safetensors",
        lambda f: (f / "model.safetensors").write_bytes(b"hello"),
        "Safetensor",
    ),
    model("model-without-weights", without("model.safetensors"), "the folder holds no weights"),
    model("model-pickle-only", pickled, "only as a pickle .*safetensors"),
    model("model-nan", filled(NORM, float("nan")), f"not finite .* in {NORM}"),
    model("model-inf", filled(EMBEDDING, float("inf")), f"not finite .* in {EMBEDDING}"),
    model("model-zero-size", reshaped(NORM, 0), f"{NORM}.*shape"),
    model("model-other-shape", reshaped(NORM, 7), f"{NORM}.*shape"),
    model("model-missing-weight", tensors(lambda weights: weights.pop(NORM)), f"1 weight.* {NORM}"),
    model(
        "model-other-architecture", settings("config.json", model_type="gpt2"), "weights are not in its files"
    ),
    model("model-config-broken", lambda f: (f / "config.json").write_text("{"), "config.json"),
    model(
        "model-config-list", lambda f: (f / "config.json").write_text("[]"), "config.json: expected a JSON"
    ),
    model("model-config-missing", without("config.json"), "config.json"),
    model("model-unknown-type", settings("config.json", model_type="nonsense"), "nonsense"),
    model("model-encoder", bert, "encoder"),
    model("model-negative-size", settings("config.json", hidden_size=-4), "--model_name_or_path"),
    model("model-size-a-word", settings("config.json", num_hidden_layers="two"), "--model_name_or_path"),
    model("model-no-heads", settings("config.json", num_attention_heads=0), "--model_name_or_path"),
    # Under ZeRO-3 each weight is sharded, and its last values are on the last rank.
    model("zero3-nan", filled(EMBEDDING, float("nan"), -1), f"not finite .* in {EMBEDDING}", deepspeed=ZERO3),
    model("zero3-other-shape", reshaped(NORM, 7), f"size mismatch for {NORM}", deepspeed=ZERO3),
    model("zero3-missing-weight", tensors(lambda weights: weights.pop(NORM)), NORM, deepspeed=ZERO3),
    model("zero3-truncated-weights", truncated, "SafetensorError", deepspeed=ZERO3),
    model(
        "model-small-vocabulary",
        both(settings("config.json", vocab_size=100), reshaped(EMBEDDING, 100, 128)),
        "the tokenizer has .* tokens and the model 100 embeddings",
    ),
    model(
        "model-generation-config",
        lambda f: (f / "generation_config.json").write_text("{"),
        "generation_config",
    ),
    Case("model-missing", lambda _: {"model_name_or_path": "./nowhere"}, "./nowhere: no such folder"),
    Case("model-a-file", lambda g: {"model_name_or_path": g.file("m.bin", b"x")}, "m.bin"),
    Case("model-empty-name", lambda _: {"model_name_or_path": ""}, "--model_name_or_path '': pass a folder"),
    model("tokenizer-broken", lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer"),
    model("tokenizer-missing", without(*TOKENIZER), "tokenizer"),
    model(
        "tokenizer-empty",
        lambda f: (f / "tokenizer.json").write_text('{"model": {"vocab": {}}}'),
        "tokenizer",
    ),
    model(
        "tokenizer-template-loops",
        lambda f: (f / "chat_template.jinja").write_text("{{ 9 ** (9 ** 9) }}"),
        "chat template: it computes more than 10 seconds",
    ),
]

CONFIGS = [
    config("config-no-yaml", "a: [", "not valid YAML"),
    config("config-list", "- a\n- b\n", "expected a mapping such as"),
    config("config-empty", "", "expected a mapping such as"),
    config("config-utf16", "max_length: 3".encode("utf-16"), "flags.yaml"),
    config("config-nul", b"max_length: 3\0", "flags.yaml"),
    config("config-unknown-flag", "learning_rte: 3", "did you mean --learning_rate"),
    config("config-object-tag", "a: !!python/object/apply:os.system ['touch hacked']", "not valid YAML"),
    config("config-repeated-key", "max_length: 128\nmax_length: 256\n", "max_length.* twice"),
    config("config-number-as-key", "3: 4\n", "unknown argument --3"),
    config("config-nested-deeply", "a: " + "[" * 100_000, "flags.yaml"),
    config(
        "config-billion-laughs",
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(
            f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "the alias .a is not supported; repeat its value",
    ),
    config("config-nested-mapping", "max_length: {a: 1}\n", "max_length"),
    Case("config-folder", lambda ground: {"config": ground.folder}, "no such file"),
    deepspeed("deepspeed-no-json", "{", "not valid JSON"),
    deepspeed("deepspeed-list", "[]", "expected a JSON object"),
    deepspeed("deepspeed-utf16", "{}".encode("utf-16"), "not valid JSON"),
    deepspeed("deepspeed-nested-deeply", '{"a":' * 100_000, "not valid JSON"),
    deepspeed(
        "deepspeed-contradicts", ZERO2 | {"train_micro_batch_size_per_gpu": 3}, "contradicts the flags"
    ),
    deepspeed(
        "deepspeed-optimizer", ZERO2 | {"optimizer": {"type": "Foo", "params": {}}}, "no optimizer 'Foo'"
    ),
    deepspeed("deepspeed-without-zero", ZERO2 | {"zero_optimization": {"stage": 0}}, "without ZeRO"),
    deepspeed("deepspeed-stage-9", ZERO2 | {"zero_optimization": {"stage": 9}}, "stage"),
    deepspeed("deepspeed-zero-a-list", ZERO2 | {"zero_optimization": [2]}, "zero_optimization"),
    deepspeed("deepspeed-bf16-a-word", ZERO2 | {"bf16": "yes"}, "bf16"),
    deepspeed("deepspeed-optimizer-a-word", ZERO2 | {"optimizer": "AdamW"}, "optimizer"),
    deepspeed(
        "deepspeed-unknown-key", ZERO2 | {"zero_optimization": {"stage": 2, "nonsense": 1}}, "nonsense"
    ),
    deepspeed(
        "deepspeed-offload-a-word",
        ZERO2 | {"zero_optimization": {"stage": 2, "overlap_comm": "x"}},
        "overlap",
    ),
    deepspeed("deepspeed-clipping-a-word", ZERO2 | {"gradient_clipping": "much"}, "gradient_clipping"),
    deepspeed("deepspeed-batch-negative", ZERO2 | {"train_batch_size": -1}, "train_batch_size"),
    deepspeed("deepspeed-optimizer-a-number", ZERO2 | {"optimizer": {"type": 5}}, "optimizer"),
    deepspeed(
        "deepspeed-optimizer-key", ZERO2 | {"optimizer": {"type": "Adam", "params": {"lrr": 1}}}, "lrr"
    ),
    deepspeed("deepspeed-scheduler", ZERO2 | {"scheduler": {"type": "Foo", "params": {}}}, "Foo"),
    deepspeed(
        "deepspeed-scheduler-key", ZERO2 | {"scheduler": {"type": "WarmupLR", "params": {"x": 1}}}, "x"
    ),
    deepspeed("deepspeed-repeated-key", '{"bf16": {}, "bf16": {}}', "the key 'bf16' appears twice"),
    deepspeed("deepspeed-removed-key", ZERO2 | {"sparse_attention": {"mode": "x"}}, "sparse"),
    deepspeed(
        "deepspeed-stage-a-word", ZERO2 | {"zero_optimization": {"stage": "two"}}, "zero_optimization.stage"
    ),
    Case("deepspeed-missing", lambda _: {"deepspeed": "no.json"}, "no.json: no such file"),
]

FLAGS = [
    flags("flag-unknown", "--learning_rte 3", "did you mean --learning_rate"),
    flags("flag-no-value", "--max_length", "--max_length"),
    flags("flag-stray-word", "--bf16 False extra", "extra"),
    flags("flag-not-a-number", "--max_length many", "invalid int value: 'many'"),
    flags("max-length-0", "--max_length 0", "--max_length 0: must be at least 2"),
    flags("max-length-negative", "--max_length -5", "--max_length -5: must be at least 2"),
    flags("max-length-absurd", "--max_length 99999999999999999999", "--max_length 99999999999999999999: "),
    flags("max-length-beyond-floats", "--max_length 1" + "0" * 400, "must be at most 2,147,483,647"),
    flags("batch-1e30", "--per_device_train_batch_size 1e30", "invalid int value: '1e30'"),
    flags("batch-absurd", "--per_device_train_batch_size 1" + "0" * 30, "--per_device_train_batch_size 1000"),
    flags("batch-0", "--per_device_train_batch_size 0", "must be greater than 0"),
    flags("eval-batch-negative", "--per_device_eval_batch_size -1", "must be greater than 0"),
    flags("learning-rate-nan", "--learning_rate nan", "--learning_rate nan: must be a finite number"),
    flags("learning-rate-negative", "--learning_rate -1", "--learning_rate -1: must be at least 0"),
    flags("learning-rate-1e30", "--learning_rate 1e30", "--learning_rate 1e.30"),
    flags(
        "epochs-negative", "--max_steps -1 --num_train_epochs -1", "--num_train_epochs -1: must be greater"
    ),
    flags("epochs-inf", "--max_steps -1 --num_train_epochs inf", "--num_train_epochs inf: must be a finite"),
    flags("epochs-nan", "--max_steps -1 --num_train_epochs nan", "--num_train_epochs nan: must be a finite"),
    flags("epochs-absurd", "--max_steps -1 --num_train_epochs 1e300", "--num_train_epochs 1e.300"),
    flags("max-steps-negative", "--max_steps -7", "--max_steps -7"),
    flags("max-steps-absurd", "--max_steps 1" + "0" * 40, "--max_steps 10000"),
    flags("save-total-limit-0", "--save_total_limit 0", "--save_total_limit 0: must be greater than 0"),
    flags("alpha-2", "--dft_alpha 2", "--dft_alpha 2: alpha must lie in"),
    flags("alpha-negative", "--dft_alpha -0.1", "--dft_alpha -0.1: alpha must lie in"),
    flags("seed-negative", "--seed -1", "--seed -1: must be at least 0"),
    flags("accumulation-0", "--gradient_accumulation_steps 0", "must be greater than 0"),
    flags(
        "accumulation-absurd",
        "--gradient_accumulation_steps 1" + "0" * 20,
        "--gradient_accumulation_steps 1000",
    ),
    flags("data-workers-negative", "--dataloader_num_workers -5", "--dataloader_num_workers -5: must be"),
    flags("data-workers-absurd", "--dataloader_num_workers 1000000", "--dataloader_num_workers 1000000"),
    flags("preprocessing-workers-0", "--preprocessing_num_workers 0", "must be greater than 0"),
    flags(
        "preprocessing-workers-absurd",
        "--preprocessing_num_workers 1000000",
        "--preprocessing_num_workers 1000000",
    ),
    flags("split-100", "--validation_split_percentage 100", "must be less than 100"),
    flags("split-nan", "--validation_split_percentage nan", "must be a finite number"),
    flags("eval-steps-0", "--eval_steps 0", "--eval_steps 0"),
    flags("logging-steps-0", "--logging_steps 0", "non-zero --logging_steps"),
    flags("logging-steps-nan", "--logging_steps nan", "--logging_steps"),
    flags("save-steps-negative", "--save_strategy steps --save_steps -2", "--save_steps -2"),
    flags("warmup-negative", "--warmup_steps -3", "--warmup_steps -3: must be at least 0"),
    flags("warmup-ratio-nan", "--warmup_ratio nan", "--warmup_ratio nan"),
    flags("clip-negative", "--max_grad_norm -1", "--max_grad_norm -1"),
    flags("clip-nan", "--max_grad_norm nan", "--max_grad_norm nan"),
    flags("beta-2", "--adam_beta1 2", "--optim adamw_torch_fused: Invalid beta"),
    flags("epsilon-negative", "--adam_epsilon -1", "--optim adamw_torch_fused: Invalid epsilon"),
    flags("samples-0", "--max_train_samples 0", "--max_train_samples 0: must be greater than 0"),
    flags("weights-infinite", "--data_weights inf", "--data_weights inf: each value must be a finite number"),
    flags("weights-absurd", "--data_weights 1e30", "--data_weights 1e.30"),
    flags("precision-both", "--bf16 True --fp16 True", "At most one of fp16 and bf16"),
    flags("date-no-date", "--chat_template_date tomorrow", "--chat_template_date tomorrow: expected a date"),
    flags(
        "json-nested-deeply",
        "--chat_template_kwargs " + "[" * 9_000,
        "--chat_template_kwargs .*nested too deep",
    ),
    flags(
        "json-huge-number",
        '--chat_template_kwargs {"a":' + "1" * 5_000 + "}",
        "--chat_template_kwargs .*digits",
    ),
    flags("boolean-maybe", "--packing maybe", "--packing"),
    flags("output-a-device", "--output_dir /dev/null/x", "--output_dir"),
    flags("scheduler-unknown", "--lr_scheduler_type sideways", "lr_scheduler_type.*sideways|sideways"),
    flags("optimizer-unknown", "--optim sgdd", "sgdd"),
    flags("tracker-unknown", "--report_to nonsense", "--report_to nonsense: unknown tracker"),
]

# ---- checkpoints ----

CHECKPOINTS = [
    checkpoint(
        "checkpoint-no-manifest", without("manifest.json"), "not a complete .*, it has no manifest.json"
    ),
    checkpoint("checkpoint-manifest-cut", swapped("manifest.json", b"{"), "its manifest.json cannot be read"),
    checkpoint(
        "checkpoint-manifest-list", swapped("manifest.json", b"[]"), "its manifest.json cannot be read"
    ),
    checkpoint(
        "checkpoint-missing-file", without("optimizer.pt"), "not a complete .*, it has no optimizer.pt"
    ),
    checkpoint(
        "checkpoint-cut-weights", truncated, r"model.safetensors has [\d,]+ of [\d,]+ bytes; .* auto takes"
    ),
    checkpoint("checkpoint-model-alone", said(resumable=False), "holds the model alone"),
    checkpoint(
        "checkpoint-other-batch", said(rows_per_step=64), "saved with 64 rows per step, and this run has"
    ),
    checkpoint("checkpoint-of-zero", said(parallelism="DeepSpeed ZeRO-3"), "saved under DeepSpeed ZeRO-3"),
    checkpoint("checkpoint-of-another-model", said(model="other"), "is a checkpoint of another model"),
    checkpoint("checkpoint-too-far", said(), "is at step 2 already", max_steps=1),
    checkpoint(
        "checkpoint-state-no-json", swapped("trainer_state.json", b"{"), "checkpoint-2: cannot be read .JSON"
    ),
    checkpoint("checkpoint-run-state", swapped("run_state.json", b"[]"), "checkpoint-2: cannot be read"),
    checkpoint(
        "checkpoint-weights-garbage", swapped("model.safetensors", b"x"), "cannot be read .*Safetensor"
    ),
    checkpoint("checkpoint-optimizer-garbage", swapped("optimizer.pt", b"x"), "checkpoint-2: cannot be read"),
    checkpoint("checkpoint-schedule-garbage", swapped("scheduler.pt", b"x"), "checkpoint-2: cannot be read"),
    checkpoint(
        "checkpoint-optimizer-runs-code", evil_optimizer, "checkpoint-2: cannot be read .*Weights only"
    ),
    checkpoint("checkpoint-others-may-write", lambda f: f.chmod(0o777), "can be written by others .mode 777"),
    checkpoint(
        "checkpoint-file-others-may-write",
        lambda f: (f / "optimizer.pt").chmod(0o666),
        "optimizer.pt can be written by others",
    ),
    Case("checkpoint-missing", lambda g: {"resume_from_checkpoint": g.folder / "no"}, "no: no such folder"),
    Case(
        "checkpoint-none-yet",
        lambda _: {"resume_from_checkpoint": True},
        "there is no complete checkpoint in",
    ),
    Case(
        "checkpoint-and-afresh",
        lambda _: {"resume_from_checkpoint": "auto", "overwrite_output_dir": True},
        "pass only one",
    ),
]

CASES = [*DATA, *TEMPLATES, *MODELS, *CONFIGS, *FLAGS, *CHECKPOINTS]

FINE = [
    data("data-byte-order-mark", "a.jsonl", b"\xef\xbb\xbf" + LINE + b"\r\n\n" + LINE, "^records"),
    data(
        "data-blocked-paths",
        "a.jsonl",
        json.dumps({**GOOD, "folder": "/etc/shadow", "path": "file:///etc/passwd"}).encode(),
        "^records",
    ),
    model(
        "tokenizer-without-eos-or-pad",
        settings("tokenizer_config.json", eos_token=None, pad_token=None),
        "^records",
    ),
    flags("flag-given-twice", "--max_length 64 --max_length 128", "the last one counts: --max_length 128"),
    Case(
        "template-of-the-readme", lambda ground: {"chat_template": ground.file("t.jinja", CHATML)}, "^records"
    ),
]
"""Unusual but valid input: these cases train, and the log matches the pattern."""

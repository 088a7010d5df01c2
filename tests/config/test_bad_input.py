"""Every bad input is one UserError that names the key, the value and what is allowed."""

from __future__ import annotations

import pytest

from lunaris.config.compose import compose
from lunaris.errors import UserError

# command line → what its message must hold
TABLE: list[tuple[str, str]] = [
    # keys
    ("moe.n_expert=16", "moe.n_expert: no such key; did you mean moe.n_experts?"),
    ("+moe.n_expert=16", "moe.n_expert: no such key; did you mean moe.n_experts?"),
    ("++moe.n_expert=16", "moe.n_expert: no such key; did you mean moe.n_experts?"),
    ("moe.foo=1", "moe.foo: no such key; allowed are moe.n_experts, "),
    ("++moe.foo.bar=1", "moe.foo: no such key; allowed are "),
    ("trainer.max_step=3", "trainer.max_step: no such key; did you mean trainer.max_steps?"),
    ("trianer.max_steps=3", "trianer.max_steps: no such key or group; did you mean trainer.max_s"),
    ("n_experts=3", "n_experts: no such key or group; did you mean moe.n_experts?"),
    ("model.learning_rate=1", "did you mean optimizer.learning_rate?"),
    ("model.d_model.x=3", "model.d_model.x: model.d_model is a value"),
    ("experiment.foo=1", "experiment.foo: experiment is a value, it has no keys of its own"),
    ("moe=none moe/router=softmax", "moe/router: the chosen option of moe has no router"),
    ("foo=3", "foo: no such key or group; allowed are name, seed, out_dir, model, attention"),
    ("+moe.n_experts=16", "write moe.n_experts=… without the plus"),
    ("~moe.n_experts", "~moe.n_experts: a key cannot be removed"),
    ("~moe", "~moe: a group cannot be removed; allowed are moe=…: fine_grained, none, switch"),
    ("moe=none moe.n_experts=4", "moe.n_experts: moe=none has no such key; moe=fine_grained, "),
    ("logger.tags=[a]", "logger.tags: no such key; did you mean logger.wandb.tags?"),
    ("logger.wandb.tags=[a]", "logger wandb is not chosen; choose it by logger=[local,wandb]"),
    (
        "logger=wandb logger.wandb.tag=[a]",
        "tag: no such key; did you mean logger.wandb.t",
    ),
    (f"logger=wandb logger.wandb.tags=[{'a' * 65}]", "aaa: a tag must have 1 to 64 characters"),
    ("logger=wandb logger.wandb.tags=['']", "logger.wandb.tags=: a tag must have 1 to 64 char"),
    (f"logger=wandb logger.wandb.group={'a' * 129}", "aaa: must have 1 to 128 characters"),
    ("logger=wandb logger.wandb.mode=onlin", "did you mean online?"),
    ("logger=wandb logger.wandb.init_timeout_s=0", "init_timeout_s=0.0: must be greater than 0"),
    ("logger=wandb logger.wandb.finish_timeout_s=-1", "finish_timeout_s=-1.0: must be at least 0"),
    (
        "logger=trackio logger.trackio.projct=x",
        "projct: no such key; did you mean logger.trackio.pr",
    ),
    (
        "logger=tensorbord",
        "logger=tensorbord: no such option; allowed are local, tensorboard, track",
    ),
    ("logger=tensorboard logger.tensorboard.dir=x", "logger.tensorboard.dir: no such key"),
    ("logger=trackio logger.trackio.project=[a]", "logger.trackio.project=[a]: must be text"),
    ("logger=trackio logger.trackio.group=[a]", "group=[a]: must be text or null"),
    # options
    ("moe=swich", "moe=swich: no such option; allowed are fine_grained, none, switch, top2; did"),
    ("moe=null", "moe=null: no such option; allowed are "),
    ("model=8", "model=8: no such option; allowed are base, large, nano, small, tiny"),
    ("experiment=smok", "experiment=smok: no such option; allowed are codex_8ex_gqa_20l, "),
    ("+experiment=smoke", "write experiment=smoke"),
    ("moo=switch", "moo: no such key or group; did you mean moe?"),
    ("+moe@data=none", "a group has one place; write moe=OPTION"),
    ("hydra/launcher=foo", "hydra/launcher=foo: no such option; allowed are basic, local, slurm"),
    # sizes whose products no integer or float holds
    (
        "model.ffn_hidden_multiplier=1e308",
        "model.ffn_hidden_multiplier=1e+308: must be at most 1024",
    ),
    ("moe.expert_hidden_multiplier=1e308", "multiplier=1e+308: must be at most 1024"),
    ("moe.n_experts=9000000000000000000", "n_experts=9000000000000000000: must be at most 65536"),
    ("moe.n_shared_experts=9000000000", "n_shared_experts=9000000000: must be at most 65536"),
    ("model.n_layers=9000000000", "model.n_layers=9000000000: must be at most 65536"),
    ("model.d_model=9000000000", "model.d_model=9000000000: must be at most 1048576"),
    ("model.multiple_of=9000000000", "model.multiple_of=9000000000: must be at most 1048576"),
    ("attention=mla attention.kv_lora_rank=9000000000", "rank=9000000000: must be at most 1048576"),
    # types
    ("moe.n_experts=four", "moe.n_experts=four: must be a whole number"),
    ("moe.n_experts=4.5", "moe.n_experts=4.5: must be a whole number"),
    ("moe.n_experts=true", "moe.n_experts=true: must be a whole number"),
    ("moe.n_experts=null", "moe.n_experts=null: must be a whole number"),
    ("model.vocab_size=none", "model.vocab_size=none: must be a whole number or null"),
    ("optimizer.learning_rate=fast", "optimizer.learning_rate=fast: must be a number"),
    ("trainer.compile_model=maybe", "trainer.compile_model=maybe: must be true or false"),
    ("trainer.compile_model=3", "trainer.compile_model=3: must be true or false"),
    ("optimizer.betas=0.9", "optimizer.betas=0.9: must be a list of 2 numbers"),
    ("optimizer.betas=[a,b]", "optimizer.betas=[a,b]: must be a list of 2 numbers"),
    ("optimizer.lr=1e-3", "optimizer.lr: no such key; did you mean optimizer.learning_rate?"),
    ("trainer.bs=4", "trainer.bs: no such key; did you mean trainer.batch_size?"),
    ("trainer.max_steps=1.5e0", "trainer.max_steps=1.5: must be a whole number"),
    ("seed=1e30", "seed=1e+30: must be a whole number"),
    ("optimizer.betas=${seed}", "optimizer.betas=1337: must be a list of 2 numbers"),
    ("optimizer._target_=${nope}", "optimizer._target_=${nope}: cannot be resolved: Interpol"),
    ("data._target_=${nope}", "data._target_=${nope}: cannot be resolved: Interpolation key"),
    ("logger=wandb logger.wandb.tags=${seed}", "logger.wandb: "),
    ("model.vocab_size=9223372036854775807", "model.vocab_size=9223372036854775807: must be be"),
    ("moe.bias_update_rate=1e308", "moe.bias_update_rate=1e+308: must be at most 1000000.0"),
    ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]: must be a list of 2 numbers"),
    # syntax
    ("moe.n_experts", "moe.n_experts: not an override; write moe.n_experts=VALUE"),
    ("moe.n_experts=[1", "moe.n_experts=[1: the value cannot be read"),
    ("out_dir=/x=3", "out_dir=/x=3: the value cannot be read"),
    ("moe.n_experts=4,8", "moe.n_experts=4,8: several values; add -m to sweep over them"),
    # values
    ("init_from_drop=1", "init_from_drop=1.0: must be between 0.0 and 0.99"),
    ("init_from_noise=-1", "init_from_noise=-1.0: must be at least 0"),
    ("init_from_strict=maybe", "init_from_strict=maybe: must be true or false"),
    ("moe.n_experts=0", "moe.n_experts=0: must be at least 1"),
    ("moe.n_experts_per_token=9", "moe.n_experts_per_token=9: must be at most moe.n_experts=8"),
    ("moe.balancing=biass", "allowed are aux_loss, bias, none; did you mean bias?"),
    ("moe.balance_scope=batch", "moe.balance_scope=batch: allowed are global, sequence"),
    ("moe.balance_scope=null", "moe.balance_scope=null: must be "),
    ("moe.capacity_scope=documents", "allowed are document, sequence; did you mean document?"),
    ("optimizer.learning_rate=-1", "optimizer.learning_rate=-1.0: must be greater than 0"),
    ("optimizer.learning_rate=nan", "optimizer.learning_rate=nan: must be a finite number"),
    ("optimizer.learning_rate=inf", "optimizer.learning_rate=inf: must be a finite number"),
    ("optimizer.betas=[0.9,1]", "optimizer.betas=[0.9, 1.0]: each must be in [0, 1)"),
    ("model.n_heads=3", "model.d_model=128: must be divisible by model.n_heads=3"),
    ("model.n_kv_heads=3", "model.n_kv_heads=3: must divide model.n_heads=4"),
    ("model.activation=swigl", "allowed are swiglu, geglu, relu2; did you mean swiglu?"),
    ("model.activation=3", "model.activation=3: allowed are swiglu, geglu, relu2"),
    ("model.norm=post", "model.norm=post: allowed are qk_reorder, pre"),
    ("model.parametrization=mu", "allowed are standard, mup; did you mean mup?"),
    ("model.mup_base_width=0", "model.mup_base_width=0: must be at least 1"),
    ("model.mup_base_head_width=0", "model.mup_base_head_width=0: must be at least 1"),
    (
        "model.parametrization=mup attention=mla model.norm=pre model.n_kv_heads=4 "
        "attention.kv_lora_rank=64",
        "attention.kv_lora_rank=64: must be null with attention=mla and model.parametrization=mup",
    ),
    (
        "model.parametrization=mup attention=mla model.norm=pre model.n_kv_heads=4 "
        "model.mup_base_head_width=32",
        "model.mup_base_head_width=32: must be null with attention=mla",
    ),
    ("attention.sinks=2", "attention.sinks=2: must be true or false"),
    ("attention.output_gate=null", "attention.output_gate=null: must be true or false"),
    ("attention.sink=true", "attention.sink: no such key; did you mean attention.sinks?"),
    ("attention.window=8", "attention.window: attention=gqa has no such key; attention=sliding_w"),
    ("attention=sliding_window attention.window=0", "attention.window=0: must be at least 1"),
    ("attention=sliding_window attention.window=null", "window=null: must be a whole number"),
    ("attention=sliding_window attention.full_every=1", "full_every=1: must be at least 2"),
    ("attention=sliding_window attention.full_every=x", "x: must be a whole number or null"),
    ("attention=sliding_window attention.sinks=1.5", "attention.sinks=1.5: must be true or false"),
    ("attention=sliding_window attention.output_gate=x", "output_gate=x: must be true or false"),
    ("attention=mla attention.q_lora_rank=0", "attention.q_lora_rank=0: must be at least 1"),
    ("attention=mla attention.kv_lora_rank=-1", "attention.kv_lora_rank=-1: must be at least 1"),
    ("attention=mla attention.qk_nope_head_dim=0", "qk_nope_head_dim=0: must be at least 1"),
    ("attention=mla attention.qk_rope_head_dim=0", "qk_rope_head_dim=0: must be at least 1"),
    ("attention=mla attention.qk_rope_head_dim=5", "qk_rope_head_dim=5: must be even for rotary"),
    ("attention=mla attention.v_head_dim=0", "attention.v_head_dim=0: must be at least 1"),
    ("attention=mla attention.v_head_dim=2.5", "v_head_dim=2.5: must be a whole number or null"),
    ("attention=mla attention.sinks=x", "attention.sinks=x: must be true or false"),
    ("attention=mla attention.output_gate=x", "output_gate=x: must be true or false"),
    ("attention=mla", "write model.norm=pre model.n_kv_heads=4"),
    ("attention=mla model.norm=pre", "model.n_kv_heads=2: attention=mla normalises its latents"),
    (
        "attention=mla model.n_kv_heads=4",
        "model.norm=qk_reorder: attention=mla normalises its latents, not queries and keys, and",
    ),
    ("trainer.precision=fp8", "trainer.precision=fp8: allowed are auto, bf16, fp16, fp32"),
    ("objective.z_loss_weight=-1", "objective.z_loss_weight=-1.0: must be at least 0"),
    ("objective=multi_token objective.depth=0", "objective.depth=0: must be at least 1"),
    (
        "objective=multi_token objective.depth=256",
        "objective.depth=256: must be below model.max_se",
    ),
    (
        "objective=multi_token objective.loss_weight=-1",
        "objective.loss_weight=-1.0: must be at lea",
    ),
    (
        "objective.depth=2",
        "objective.depth: objective=next_token has no such key; objective=multi_t",
    ),
    ("objective.z_loss_weight=x", "objective.z_loss_weight=x: must be a number"),
    ("objective.logit_soft_cap=0", "objective.logit_soft_cap=0.0: must be greater than 0"),
    ("objective.logit_soft_cap=inf", "objective.logit_soft_cap=inf: must be a finite number"),
    ("objective.z_loss=1", "objective.z_loss: no such key; did you mean objective.z_loss_weight?"),
    ("trainer.max_skipped_steps=0", "trainer.max_skipped_steps=0: must be at least 1"),
    ("trainer.spike_window=4", "trainer.spike_window=4: must be between 8 and 65536"),
    ("trainer.spike_threshold=0", "trainer.spike_threshold=0.0: must be greater than 0"),
    ("seed=-1", "seed=-1: must be between 0"),
    ("name=a/b", "name=a/b: must be 1 to 200 letters, digits"),
    ("name=''", "name=: must be 1 to 200 letters, digits"),
    ("moe/router=sigmod", "moe/router=sigmod: no such option; allowed are sigmoid, softmax"),
    ("moe.router.n_groups=2", "moe.router.n_groups: moe/router=softmax has no such key"),
    ("moe=fine_grained moe.router.n_group=2", "did you mean moe.router.n_groups?"),
    ("moe=fine_grained moe.router.n_groups=0", "moe.router.n_groups=0: must be at least 1"),
    ("moe=fine_grained moe.router.n_groups=two", "moe.router.n_groups=two: must be a whole num"),
    ("moe=fine_grained moe.router.n_groups=3", "n_groups=3: must divide moe.n_experts=16"),
    ("moe=fine_grained moe.router.topk_groups=0", "moe.router.topk_groups=0: must be at least 1"),
    (
        "moe=fine_grained moe.router.topk_groups=2",
        "moe.router.topk_groups=2: must be at most moe.router.n_groups=1",
    ),
    (
        "moe=fine_grained moe.router.n_groups=8",
        "moe.router.topk_groups=1: such groups hold 2 experts, fewer than moe.n_experts_per_tok",
    ),
    ("moe=fine_grained moe.router.route_scale=0", "route_scale=0.0: must be greater than 0"),
    ("moe=fine_grained moe.router.route_scale=nan", "route_scale=nan: must be a finite number"),
    (
        "moe/router=sigmoid moe.router.sequence_loss_weight=-1",
        "moe.router.sequence_loss_weight=-1.0: must be at least 0",
    ),
    # what has to be given, or leads nowhere
    ("data=shards", "data.dir: must be given, it has no default; write data.dir=FOLDER"),
    ("data=text data.dir=x", "data.files: must be given"),
    ("data=text data.dir=x data.files=y data.format=chad", "format=chad: allowed are auto, text"),
    ("experiment=codex_8ex_gqa_20l", "data.dir: must be given"),
    ("trainer.max_steps=${foo.bar}", "trainer.max_steps=${foo.bar}: cannot be resolved: "),
    ("name=???", "name: must be given"),
    ("model.vocab_size=99999999999999999999", "model.vocab_size=99999999999999999999: must be b"),
    ("out_dir=${oc.env:LUNARIS_ABSENT}", "out_dir=${oc.env:LUNARIS_ABSENT}: cannot be resolved"),
    # several keys together
    (
        "trainer.profile_steps=[3]",
        "trainer.profile_steps=[3]: must be two steps, the first and the",
    ),
    ("trainer.profile_steps=[0,3]", "trainer.profile_steps=[0, 3]: must be two steps, the first "),
    ("trainer.profile_steps=[4,3]", "trainer.profile_steps=[4, 3]: must be two steps, the first "),
    ("trainer.profile_steps=[3,601]", "and the last, between 1 and 600 (trainer.max_steps), or []"),
    ("trainer.profile_steps=[1,21]", "trainer.profile_steps=[1, 21]: must be at most 20 steps"),
    ("trainer.profile_steps=[a,3]", "trainer.profile_steps=[a,3]: must be"),
    ("trainer.profile_steps=3", "trainer.profile_steps=3: must be"),
    ("trainer.profile_steps=null", "trainer.profile_steps=null: must be"),
    ("moe.first_dense_layers=4", "moe.first_dense_layers=4: must be below model.n_layers=4"),
    ("schedule.warmup_steps=601", "schedule.warmup_steps=601: must be at most trainer.max_steps"),
    ("schedule=wsd schedule.warmup_steps=590", "must leave room for the 120 steps of decay"),
    ("model.vocab_size=100", "model.vocab_size=100: must be at least data.vocab_size=2048"),
    ("data=synthetic data.n_tokens=100", "model.max_seq_len=256: one sequence needs 257 tokens"),
    ("parallelism=single launch.processes=2", "parallelism=single: one process, but launch.proc"),
    ("launch.processes=0", "launch.processes=0: must be a whole number of at least 1, or auto"),
    ("launch.processes=atuo", "launch.processes=atuo: must be a whole number of at least 1"),
    ("launch.processes=true", "launch.processes=True: must be a whole number"),
    (
        "launch=slurm launch.nodes=2 parallelism=single",
        "one process, but launch.nodes=2 × 1 processes = 2",
    ),
    (
        "parallelism=ddp launch.processes=3 parallelism.expert_parallel=2",
        "parallelism.expert_parallel=2: must divide the world: launch.processes=3",
    ),
    (
        "parallelism=ddp launch.processes=3 parallelism.expert_parallel=3",
        "parallelism.expert_parallel=3: must divide moe.n_experts=8",
    ),
    (
        "parallelism=fsdp launch.processes=6 parallelism.expert_parallel=2",
        "parallelism.expert_parallel=2: 3 processes share each expert, and 3 divides neither "
        "model.d_model=128 nor the experts' width of 176",
    ),
    (
        "parallelism=hsdp launch.processes=12 parallelism.shard_size=6 "
        "parallelism.expert_parallel=2",
        "parallelism.expert_parallel=2: 3 processes share each expert, and 3 divides neither",
    ),
    (
        "parallelism=ddp launch.processes=2 parallelism.expert_parallel=2 moe=none",
        "parallelism.expert_parallel=2: must be 1 with moe=none",
    ),
    (
        "parallelism=hsdp launch.processes=4 parallelism.shard_size=3",
        "parallelism.shard_size=3: must divide the world: launch.processes=4",
    ),
    (
        "launch.processes=4 parallelism=hsdp parallelism.shard_size=2 "
        "parallelism.expert_parallel=4",
        "parallelism.expert_parallel=4: must divide parallelism.shard_size=2",
    ),
    ("launch=slurm launch.timeout_min=1", "launch.signal_delay_s=120: must be below the 60 sec"),
    (
        "launch=slurm parallelism=ddp launch.gpus_per_node=2 launch.tasks_per_node=4",
        "launch.tasks_per_node=4: must be at most launch.gpus_per_node=2",
    ),
    # classes
    ("moe._target_=lunaris.moe.factory.Moe", "did you mean lunaris.moe.factory.MoEFactory?"),
    ("moe._target_=lunaris.moe.factory.DenseFactory", "choose it by moe=none"),
    ("moe._target_=json.decoder.JSONDecodr", "json.decoder has no JSONDecodr; did you mean JSOND"),
    ("optimizer._target_=json.tool.json", "=json.tool.json: not a class"),
    ("optimizer._target_=json.JSONDecoder.no", "=json.JSONDecoder.no: JSONDecoder has no no"),
    ("moe._target_=no_such_package.MoE", "no such module on the Python path"),
    ("moe._target_=MoE", "moe._target_=MoE: must be the dotted path of a class"),
]


@pytest.mark.parametrize(("command", "message"), TABLE, ids=[row[0] for row in TABLE])
def test_bad_input_is_one_message(command: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(command.split(" "))
    text = str(caught.value)
    assert message in text
    assert "use +" not in text and "full_key" not in text
    assert len(text.splitlines()) <= 2


def test_an_empty_override_is_refused() -> None:
    with pytest.raises(UserError, match="an empty override"):
        compose([""])


def test_world_comes_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process, but torchrun started 2 processes"):
        compose(["parallelism=single"])
    assert compose(["parallelism=ddp"]).launch.processes == 2

"""The policy's loss and gradient beside TRL's GRPO trainer, and the speed of both.

    python tests/soak/trl_policy.py [FOLDER]
        FOLDER holds TRL's environment (.soak-trl by default); writes
        outputs/reference/soak/trl_policy.json

One tiny language model, one batch of responses that our engine drew, the same rewards. The batch is
off policy: the weights have moved since it was drawn, so that ratios, clipping and the correction
for the sampler all do something. Each option that both know is compared: loss, and the gradient of
every weight. Then both draw the same number of responses from the same prompts, in turn. It takes
some three minutes of two cores once TRL is installed.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HOME / "tests"))
TRL = ("trl==1.16.0", "torch==2.13.0", "torchvision==0.28.0", "transformers==5.19.0")
TOKENS, RESPONSES, ROUNDS = 24, 8, 20
PROMPTS = (
    "Which of these is it?",
    "The rash, not the fever.",
    "A: fever B: rash.",
    "The answer is",
)
# what is compared: our options, and TRL's configuration for the same
VARIANTS = {
    "tokens count alike (DAPO)": ({}, {"loss_type": "dapo"}),
    "responses count alike (GRPO)": ({"normalise": "response"}, {"loss_type": "grpo"}),
    "a constant (Dr. GRPO)": ({"normalise": "constant"}, {"loss_type": "dr_grpo"}),
    "ratios of sequences (GSPO)": (
        {"normalise": "response", "ratio": "sequence"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
    "a price for moving away": ({"kl": 0.1}, {"loss_type": "dapo", "beta": 0.1}),
    "no correction for the sampler": ({"truncate": 0.0}, {"loss_type": "dapo"}),
}

# runs in TRL's environment
IN_TRL = """
import json, sys, time
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

job = json.load(open(sys.argv[1]))
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(job["model"])
chats = [[{"role": "user", "content": text}] for text in job["prompts"]]
data = Dataset.from_dict({"prompt": chats * 4})


def trainer_of(config):
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    args = GRPOConfig(
        output_dir=job["out"], use_cpu=True, bf16=False, report_to="none",
        per_device_train_batch_size=len(job["prompts"]) * job["responses"],
        num_generations=job["responses"], max_completion_length=job["tokens"],
        epsilon=0.2, epsilon_high=0.28, temperature=1.0, top_p=1.0, top_k=0,
        gradient_accumulation_steps=1, steps_per_generation=1,
        **{"beta": 0.0, "scale_rewards": "none", **config},
    )
    reward = lambda completions, **kw: [float(len(c[0]["content"]) % 3) for c in completions]
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, args=args, train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


inputs = {name: torch.tensor(value) for name, value in job["inputs"].items()}
losses = {}
for n, (name, config, corrects) in enumerate(job["variants"]):
    trainer = trainer_of(config)
    trainer.use_vllm = corrects  # only then does TRL correct for the sampler
    trainer.vllm_importance_sampling_correction = True
    own = {**inputs, "num_items_in_batch": inputs["completion_mask"].sum()}
    if corrects:
        apart = inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]
        own["importance_sampling_ratio"] = apart.exp().clamp(max=2.0)
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, own)
    loss.backward()
    losses[name] = loss.item()
    gradients = {k: p.grad for k, p in trainer.model.named_parameters() if p.grad is not None}
    save_file({k: g.contiguous() for k, g in gradients.items()}, job["gradients"] % n)
trainer = trainer_of({"loss_type": "dapo"})
prompts = [{"prompt": chat} for chat in chats for _ in range(job["responses"])]
seconds = []
for _ in range(job["rounds"] + 1):
    start = time.time()
    trainer._generate_and_score_completions([dict(p) for p in prompts])
    seconds.append(time.time() - start)
json.dump({"losses": losses, "seconds": seconds[1:]}, open(sys.argv[2], "w"))
"""


def make_environment(folder: Path) -> Path:
    "The Python of TRL's environment, which is made if it is not there."
    uv, python = str(Path(sys.executable).parent / "uv"), folder / "bin" / "python"
    if not python.exists():
        print("installing TRL", flush=True)
        venv = [uv, "venv", "--quiet", "--python", sys.executable, str(folder)]
        subprocess.run(venv, check=True)
        subprocess.run([uv, "pip", "install", "-q", "--python", str(python), *TRL], check=True)
    return python


def draw_batch(folder: Path):
    "(engine, rollouts, advantages) of a policy, with the prompts' groups one after the other."
    from toys import chat

    from octomed.generate.engine_transformers import TransformersEngine
    from octomed.generate.samples import Request, Sampling
    from octomed.train.policy import compare_in_group

    engine = TransformersEngine(folder, "tiny@1", 12_544)
    asked = [Request(text, chat(text), text, tuple(range(RESPONSES))) for text in PROMPTS]
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=TOKENS)
    drawn = {(r.sample.question, r.sample.index): r for r in engine.roll(asked, sampling)}
    rollouts = [drawn[text, index] for text in PROMPTS for index in range(RESPONSES)]
    advantages = []
    for start in range(0, len(rollouts), RESPONSES):
        group = rollouts[start : start + RESPONSES]
        advantages += compare_in_group([float(len(r.sample.text) % 3) for r in group])
    return engine, (asked, sampling), rollouts, advantages


def move_weights(model, by: float, seed: int):
    "Move every weight a little, as an update would."
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(by * parameter.abs().mean() * noise)


def read_rows(model, processor, rollouts):
    "(tokens,) log-probabilities of all responses under a model, one after the other."
    from octomed.generate.render import Row
    from octomed.train.loop import prepare_padded
    from octomed.train.policy import logprobs_class

    rows = [Row(r.prompt + r.ids, len(r.prompt), []) for r in rollouts]
    return logprobs_class()(model)(*prepare_padded(processor, rows, None))[0]


def pad(rows: list[list], left: bool, filler=0):
    width = max(map(len, rows))
    blanks = [[filler] * (width - len(row)) for row in rows]
    pairs = zip(blanks, rows, strict=True)
    return [blank + row if left else row + blank for blank, row in pairs]


def split_by_response(values, rollouts) -> list[list[float]]:
    left = iter(values.tolist())
    return [[next(left) for _ in rollout.ids] for rollout in rollouts]


def our_gradient(model, processor, rollouts, facts, options):
    "(loss, gradient by name) of our objective."
    import torch

    from octomed.train.policy import TokenFacts, sum_policy_loss, weigh_responses

    sizes = torch.tensor([len(r.ids) for r in rollouts])
    weights = torch.tensor(weigh_responses(sizes.tolist(), options.normalise, TOKENS))
    model.zero_grad()
    now = read_rows(model, processor, rollouts)
    own = TokenFacts(
        **facts,
        weight=weights.repeat_interleave(sizes),
        response=torch.arange(len(rollouts)).repeat_interleave(sizes),
    )
    loss = sum_policy_loss(now, own, options)[0] / int(sizes.sum())
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def compare(theirs: dict, path: Path) -> float:
    "The largest difference of two gradients, beside the norm of one of them."
    import torch
    from safetensors.torch import load_file

    other = load_file(path)
    norm = torch.cat([g.flatten() for g in other.values()]).norm()
    return max(float((theirs[name] - g).norm() / norm) for name, g in other.items())


def time_ours(engine, asked) -> list[float]:
    "Seconds of each round of drawing; the first is not counted."
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.time()
        list(engine.roll(*asked))
        seconds.append(time.time() - start)
    return seconds[1:]


def main(work: Path):
    import torch
    from text_models import save_text_model

    from octomed.core.files import write_json
    from octomed.core.identity import make_card
    from octomed.core.paths import root
    from octomed.train.policy import PolicyOptions
    from octomed.train.students import load_student

    began = time.time()
    work.mkdir(parents=True, exist_ok=True)
    os.environ["OCTOMED_STORE"] = str(work / "store")
    python = make_environment(work / "trl")
    save_text_model("llama", work / "model", hidden_size=64)
    engine, asked, rollouts, advantages = draw_batch(work / "model")
    model, processor = load_student(work / "model")
    start = read_rows(model, processor, rollouts).detach()
    move_weights(model, by=0.02, seed=1)
    before = read_rows(model, processor, rollouts).detach()
    move_weights(model, by=0.05, seed=2)
    model.save_pretrained(work / "moved")
    processor.tokenizer.save_pretrained(work / "moved")
    sizes = torch.tensor([len(r.ids) for r in rollouts])
    facts = {
        "before": before,
        "drawn": torch.tensor([x for r in rollouts for x in r.logprobs]),
        "advantage": torch.tensor(advantages).repeat_interleave(sizes),
        "start": start,
    }
    inputs = {
        "prompt_ids": pad([r.prompt for r in rollouts], left=True),
        "prompt_mask": pad([[1] * len(r.prompt) for r in rollouts], left=True),
        "completion_ids": pad([r.ids for r in rollouts], left=False),
        "completion_mask": pad([[1] * len(r.ids) for r in rollouts], left=False),
        "advantages": advantages,
    }
    logprobs = {
        "old_per_token_logps": before,
        "ref_per_token_logps": start,
        "sampling_per_token_logps": facts["drawn"],
    }
    for name, values in logprobs.items():
        inputs[name] = pad(split_by_response(values, rollouts), left=False, filler=0.0)
    job = {
        "model": str(work / "moved"),
        "prompts": PROMPTS,
        "responses": RESPONSES,
        "tokens": TOKENS,
        "rounds": ROUNDS,
        "out": str(work / "out"),
        "inputs": inputs,
        "gradients": str(work / "gradient-%d.safetensors"),
        "variants": [
            (name, config, ours.get("truncate") != 0.0) for name, (ours, config) in VARIANTS.items()
        ],
    }
    (work / "job.json").write_text(json.dumps(job))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    env.pop("PYTHONPATH", None)
    command = [str(python), "-c", IN_TRL, str(work / "job.json"), str(work / "trl.json")]
    subprocess.run(command, env=env, check=True)
    theirs, rows = json.loads((work / "trl.json").read_text()), []
    for n, (name, (ours, _)) in enumerate(VARIANTS.items()):
        own = {**facts}
        if ours.get("truncate") == 0.0:  # as if the sampler were the policy before
            own["drawn"], ours = before, {}
        options = PolicyOptions(**ours)
        loss, gradient = our_gradient(model, processor, rollouts, own, options)
        row = {
            "what": name,
            "loss": loss,
            "loss_trl": theirs["losses"][name],
            "gradient_apart": compare(gradient, Path(job["gradients"] % n)),
        }
        rows.append(row)
        print(row, flush=True)
    mine, drawn = time_ours(engine, asked), len(rollouts)
    speed = {
        "rollouts_a_second": drawn / statistics.median(mine),
        "rollouts_a_second_trl": drawn / statistics.median(theirs["seconds"]),
        "seconds": mine,
        "seconds_trl": theirs["seconds"],
    }
    alike = [abs(r["loss"] - r["loss_trl"]) < 1e-5 and r["gradient_apart"] < 1e-4 for r in rows]
    facts = {
        "pins": list(TRL),
        "responses": drawn,
        "compared": rows,
        "speed": speed,
        "good": all(alike),
        "card": make_card(minutes=round((time.time() - began) / 60, 1)),
    }
    write_json(root() / "outputs" / "reference" / "soak" / "trl_policy.json", facts)
    print(json.dumps(speed, indent=1))
    sys.exit(not facts["good"])


if __name__ == "__main__":
    if any(word.startswith("-") for word in sys.argv[1:]):
        sys.exit(__doc__)
    main(Path(*sys.argv[1:] or [HOME / ".soak-trl"]).resolve())

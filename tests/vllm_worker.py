"""The part of `test_vllm.py` that a real vLLM engine runs, in vLLM's own environment.

python tests/vllm_worker.py STUDENT JOBS.json OUT.json      OCTOMED_STORE holds the pictures
"""

import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from octomed.core.paths import OctomedError
from octomed.generate.engine_vllm import VLLMEngine
from octomed.generate.engines import FORCED, ChatPrompt
from octomed.generate.render import list_image_ids
from octomed.generate.samples import Request, Sampling


def main(student, jobs, out):
    jobs = json.loads(Path(jobs).read_text())
    options = {
        "max_pixels": 12_544,
        "logprobs": True,
        "logprobs_mode": "processed_logprobs",  # of what is drawn, as a policy needs them
        "max_model_len": 2048,
        "max_num_seqs": 32,
        "enforce_eager": True,
        "block_size": 32,
        "distributed_executor_backend": "uni",
        "reasoning_config": {"reasoning_start_str": "<think>", "reasoning_end_str": FORCED},
    }
    engine, results = VLLMEngine(student, "tiny@1", ahead=24, **options), {}
    for name, job in jobs["generate"].items():
        asked = [
            Request(r["question"], r["messages"], r["prompt"], tuple(r["indices"]))
            for r in job["requests"]
        ]
        samples = engine.generate(asked, Sampling(**job["sampling"]))
        results[name] = [asdict(s) for s in itertools.islice(samples, job.get("take"))]
        samples.close()
        assert not engine.llm.llm_engine.has_unfinished_requests(), f"{name} left something running"
    results |= compare_with_one_request(engine, jobs["fan"])
    results["scored"] = score(engine, jobs["scored"])
    try:
        engine.likelihoods(["one " * 3000], [["two"]])
    except OctomedError as error:
        results["too long"] = str(error)
    results["rolled"] = roll_and_reload(engine, student, jobs["fan"])
    results["images_drawn"] = count_drawn_images(engine, jobs["fan"])
    results["built_in"] = [
        end_thought_in_vllm(engine, messages, budget=jobs["budget"], answer=jobs["answer"])
        for messages in jobs["thoughts"]
    ]
    Path(out).write_text(json.dumps(results))


def score(engine, pairs) -> list:
    "(log-probability, tokens, whether each is the likeliest) of each continuation of each prompt."
    prompts = [
        prompt if isinstance(prompt, str) else ChatPrompt(*prompt, ends_thought=True)
        for prompt, _ in pairs
    ]
    scored = engine.likelihoods(prompts, [texts for _, texts in pairs])
    return [[(s.logprob, s.tokens, s.is_greedy) for s in row] for row in scored]


def roll_and_reload(engine, student, messages) -> list:
    "Rollouts of the student, of it with other weights handed over, and of it again."
    import torch

    from octomed.train.students import load_student

    model, _ = load_student(student)
    asked = [Request("rolled", messages, "p", tuple(range(4)))]
    rolled = []
    for by in (None, 0.02, -0.02):
        if by is not None:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(by)
            engine.take_weights(model, f"moved by {by}")
        drawn = engine.roll(asked, Sampling(temperature=1.0, top_p=1.0, max_tokens=8))
        drawn = sorted(drawn, key=lambda r: r.sample.index)
        rolled.append([(r.prompt, r.ids, r.logprobs, r.sample.model) for r in drawn])
    return rolled


def run_to_end(core) -> dict:
    "Step until nothing is left; the outputs that ended, by request id."
    done = {}
    while core.has_unfinished_requests():
        done |= {output.request_id: output for output in core.step() if output.finished}
    return done


def compare_with_one_request(engine, messages, seed=1000) -> dict:
    """Texts of vLLM's own n=16, and of sixteen requests with the seeds that vLLM gives its sixteen.

    Also, for each of these, how much of its prompt was already read."""
    engine.llm.reset_prefix_cache()
    text, images, size = engine._prompt(messages)
    ready, core = engine._input(text, images, size), engine.llm.llm_engine
    sampling = Sampling(temperature=1.0, max_tokens=16)
    for i in range(16):
        core.add_request(f"{i:02}", ready, engine._params(sampling, seed + i, 16))
    done = run_to_end(core)
    one = engine._params(sampling, seed, 16)
    one.n = 16
    core.add_request("one", ready, one)
    whole = run_to_end(core)["one"]
    return {
        "one_request": [completion.text for completion in whole.outputs],
        "many_requests": [done[k].outputs[0].text for k in sorted(done)],
        "cached": [[done[k].num_cached_tokens, size] for k in sorted(done)],
    }


def count_drawn_images(engine, messages) -> dict:
    "How many tokens of images are drawn as the engine draws, and where nothing forbids them."
    text, images, size = engine._prompt(messages)
    ready, core = engine._input(text, images, size), engine.llm.llm_engine
    ids, counts = set(list_image_ids(engine.processor)), {}
    forbids = engine.forbids
    for name, forbidden in (("forbidden", forbids), ("allowed", {})):
        engine.forbids = forbidden
        for seed in range(16):
            params = engine._params(Sampling(temperature=2.0, top_p=1.0), seed, 32)
            core.add_request(f"{name} {seed}", ready, params)
        outputs = [output.outputs[0] for output in run_to_end(core).values()]
        counts[name] = sum(token in ids for out in outputs for token in out.token_ids)
    engine.forbids = forbids
    return counts


def end_thought_in_vllm(engine, messages, *, budget, answer):
    """(text, tokens) of a greedy response whose thought vLLM itself ends after `budget` tokens.

    The prompt opens the thought."""
    text, images, _size = engine._prompt(messages)
    tokens = budget + len(engine._ids(FORCED)) + answer
    params = engine._params(Sampling(temperature=0), 0, tokens)
    params.thinking_token_budget = budget
    core = engine.llm.llm_engine
    core.add_request("thought", engine._input(text + "<think>", images), params)
    out = run_to_end(core)["thought"].outputs[0]
    return out.text, len(out.token_ids)


if __name__ == "__main__":
    main(*sys.argv[1:])

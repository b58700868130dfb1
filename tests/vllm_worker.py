"""What `tests/test_vllm.py` asks of a real vLLM engine, run by the Python of vLLM's own environment.

python tests/vllm_worker.py STUDENT JOBS.json OUT.json      OCTOMED_STORE holds the pictures
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from octomed.generate.engine_vllm import VLLMEngine
from octomed.generate.engines import FORCED, Request, Sampling


def main(student, jobs, out):
    jobs = json.loads(Path(jobs).read_text())
    options = {
        "max_pixels": 12_544,
        "logprobs": True,
        "max_model_len": 2048,
        "max_num_seqs": 32,
        "enforce_eager": True,
        "block_size": 32,
        "distributed_executor_backend": "uni",
        "reasoning_config": {"reasoning_start_str": "<think>", "reasoning_end_str": FORCED},
    }
    engine, found = VLLMEngine(student, "tiny@1", ahead=24, **options), {}
    for name, job in jobs["generate"].items():
        asked = [
            Request(r["question"], r["messages"], r["prompt"], tuple(r["indices"]))
            for r in job["requests"]
        ]
        got = engine.generate(asked, Sampling(**job["sampling"]))
        found[name] = [asdict(s) for s, _ in zip(got, range(job.get("take", 10**9)), strict=False)]
        got.close()
        assert not engine.llm.llm_engine.has_unfinished_requests(), f"{name} left something running"
    found["one_request"], found["many_requests"], found["cached"] = in_one(engine, jobs["fan"])
    found["built_in"] = [
        built_in(engine, m, jobs["budget"], jobs["answer"]) for m in jobs["thoughts"]
    ]
    Path(out).write_text(json.dumps(found))


def in_one(engine, messages, seed=1000):
    "Texts of vLLM's own n=16, of sixteen requests with the seeds that vLLM gives its sixteen, and how much of its prompt each of these found read."
    engine.llm.reset_prefix_cache()
    text, images, size = engine._prompt(messages)
    ready, s, core = (
        engine._input(text, images, size),
        Sampling(temperature=1.0, max_tokens=16),
        engine.llm.llm_engine,
    )
    one = engine._params(s, seed, 16)
    one.n = 16
    for i in range(16):
        core.add_request(f"{i:02}", ready, engine._params(s, seed + i, 16))
    done = {}
    while core.has_unfinished_requests():
        done |= {o.request_id: o for o in core.step() if o.finished}
    core.add_request("one", ready, one)
    while core.has_unfinished_requests():
        whole = [o for o in core.step() if o.finished]
    return (
        [c.text for c in whole[0].outputs],
        [done[k].outputs[0].text for k in sorted(done)],
        [[done[k].num_cached_tokens, size] for k in sorted(done)],
    )


def built_in(engine, messages, budget, answer):
    "(text, tokens) of a greedy response whose thought vLLM itself ends after `budget` tokens; the prompt opens the thought."
    text, images, _size = engine._prompt(messages)
    p = engine._params(Sampling(temperature=0), 0, budget + len(engine._ids(FORCED)) + answer)
    p.thinking_token_budget = budget
    engine.llm.llm_engine.add_request("thought", engine._input(text + "<think>", images), p)
    while engine.llm.llm_engine.has_unfinished_requests():
        for o in engine.llm.llm_engine.step():
            if o.finished:
                return o.outputs[0].text, len(o.outputs[0].token_ids)
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])

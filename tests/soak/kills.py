"""A section killed with SIGKILL at random moments and run again ends with the results of an uninterrupted run.

    python tests/soak/kills.py [KILLS]      writes outputs/reference/soak/kills.json
"""
import json, os, random, signal, subprocess, sys, tempfile, time
from pathlib import Path
from octomed.core import card, root, write_json

SECTION = "42_formatting"


def start(folder: Path):
    env = {**os.environ, "OCTOMED_OUTPUTS": str(folder), "OCTOMED_STORE": str(folder/"store")}
    return subprocess.Popen([sys.executable, "-m", "octomed.cli", "run", "smoke", "--only", SECTION], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def results(folder: Path) -> dict:
    found = json.loads((folder/"smoke"/"results"/f"{SECTION}.json").read_text())
    return {k: found[k] for k in ("claims", "rows", "funnel")}


def main(kills: int):
    started, rng, log = time.time(), random.Random(0), []
    whole, broken = (Path(tempfile.mkdtemp(prefix="octomed-soak-")) for _ in range(2))
    begun = time.time()
    assert start(whole).wait() == 0
    length = time.time() - begun
    for n in range(kills):
        p = start(broken)
        try: p.wait(timeout=rng.uniform(3, 0.4*length))
        except subprocess.TimeoutExpired: os.killpg(p.pid, signal.SIGKILL); p.wait()
        done = sorted(f.name.rsplit("-", 1)[0] for f in (broken/"store"/"stages").glob("*") if (f/"card.json").exists())
        log.append({"kill": n + 1, "exit": p.returncode, "finished stages": len(done)})
        print(log[-1], flush=True)
    assert start(broken).wait() == 0, "the last run did not end well"
    same = results(whole) == results(broken)
    out = root()/"outputs"/"reference"/"soak"/"kills.json"
    write_json(out, {"section": SECTION, "recipe": "smoke", "kills": log, "same_results": same, "seconds_uninterrupted": round(length, 1), "card": card(minutes=round((time.time() - started)/60, 1))})
    print(f"{kills} kills; results equal to the uninterrupted run: {same}")
    sys.exit(not same)


if __name__ == "__main__": main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)

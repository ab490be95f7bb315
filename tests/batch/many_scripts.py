"""Make a batch of long prompts in ten scripts at the two most extreme sizes, twice; the second run makes nothing.

`python tests/batch/many_scripts.py OUTPUT_DIR` is the long run, 50 prompts at each size. test_rows.py makes fewer.
"""

import argparse
import sys
import time
from pathlib import Path

SIZES = ("16x3328", "3328x16")
SHORTEST, LONGEST = 50, 100_000
SCRIPTS = {
    "Latin": "a large red circle moves slowly from left to right, naïve café façade ",
    "Cyrillic": "большой красный круг медленно движется слева направо ",
    "Greek": "ένας μεγάλος κόκκινος κύκλος κινείται αργά προς τα δεξιά ",
    "Arabic": "دائرة حمراء كبيرة تتحرك ببطء من اليسار إلى اليمين ",
    "Hebrew": "עיגול אדום גדול נע לאט משמאל לימין על רקע שחור ",
    "Devanagari": "एक बड़ा लाल वृत्त धीरे-धीरे बाएँ से दाएँ चलता है ",
    "Thai": "วงกลมสีแดงขนาดใหญ่เคลื่อนที่ช้าๆจากซ้ายไปขวา ",
    "Chinese": "一个巨大的红色圆圈在黑色背景上从左向右缓慢移动，",
    "Japanese": "大きな赤い円が黒い背景の上を左から右へゆっくり動く、",
    "Korean": "커다란 빨간 원이 검은 배경에서 왼쪽에서 오른쪽으로 움직인다 ",
    "emoji": "🔴➡️👩🏽‍🚀🇩🇪⚫🟥🔵✨🌈🎬",
}


def prompts(count: int, longest: int = LONGEST) -> list[str]:
    """Return prompts of SHORTEST to `longest` characters, with newlines, the scripts in turn"""
    found = []
    for number in range(count):
        length = round(SHORTEST * (longest / SHORTEST) ** (number / max(1, count - 1)))
        text = [*SCRIPTS.values()][number % len(SCRIPTS)]
        lines = "\n".join([text * 3] * (length // (3 * len(text)) + 1))
        found.append(f"{number} {lines}"[:length])
    return found


def rows(count: int, longest: int = LONGEST) -> list[dict]:
    """Return a row for each prompt and size"""
    return [{"prompt": prompt, "resolution": size} for prompt in prompts(count, longest) for size in SIZES]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=50)
    arguments = parser.parse_args()
    from turbo_nb import batch

    jobs = [batch.Job(prompt=row.pop("prompt"), settings=row) for row in rows(arguments.prompts)]
    for again in (False, True):
        begin = time.perf_counter()
        summary = batch.run(jobs, {"model": "nano", "device": "cpu"}, arguments.folder, num_frames=1, num_steps=1)
        seconds = time.perf_counter() - begin
        assert (len(summary.done), summary.made) == (len(jobs), 0 if again else len(jobs)) and summary.sheet
        print(f"{seconds:.1f} s; {summary.line()}", file=sys.stderr)

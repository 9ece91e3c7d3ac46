"""x"""
import re

def grade_all(problems, texts):
    """[(verdict, prediction)]"""
    out = []
    for p, t in zip(problems, texts):
        m = re.findall(r"answer is (-?\d+)", t)
        pred = m[-1] if m else None
        out.append(("no answer" if pred is None else "right" if pred == p["answer"] else "wrong", pred))
    return out

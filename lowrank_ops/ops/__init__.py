"""The three ops: functions that call them, the compiled extension, fake kernels, FLOP formulas, the reference in plain
torch, policies, measurements and `explain`.

May import: runtime, text.
"""

"""The user's model: its layers, the data that it runs on, its calls and its state. Knows no factorized module.

May import: runtime, text.
"""

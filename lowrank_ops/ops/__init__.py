"""The call: the ops as functions, their extension and fakes, the reference, policies and `explain`."""

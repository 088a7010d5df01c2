"""The schema of every config group: its keys, their types and their defaults. No torch.

A group that a person picks a class for carries `_target_`; `lunaris.run` instantiates it with the
group's other keys as keyword arguments. What one key can check alone is checked in
`__post_init__`, under its dotted name; what several groups decide together is in `validate`.
"""

"""Methods that learn the coefficients of a merge, one file each; the file's name is the method's.

A file declares

- its docstring, with the paper and what differs from it;
- `class Params(LearnParams)`, or a subclass of it with other defaults;
- `learn(session, params) -> Outcome`, most often one call of `descend`, which goes downhill on the coefficients;
- at will, `NEEDS_DATA = False`: it looks at the models alone.
"""

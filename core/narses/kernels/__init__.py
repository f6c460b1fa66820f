"""Machine code for the two things that cost time: sorting columns and measuring distances. Kernels know nothing of rules.

Each kernel computes, bit for bit, what its plain definition in narses.combine or narses.updates computes, except that
distances differ from those of narses.distances in their last bits; where it cannot be had, that definition is used.
Modules: `networks` (which comparisons sort), `jit` (LLVM IR to a callable), `threads` (ranges over cores), and one module
per family of kernels.
"""

"""Learn the coefficients of a merge from data: `theta = theta_0 + sum_i c_i tau_i`, and only the `c_i` are trained.

The gradient of any loss is `dL/dc_i = <dL/dtheta, tau_i>`, block by block, so the task vectors stay on disk: in memory
are one model, its gradients, and a slice of every task vector. The methods are in `toolkit.merge.learned`.
"""

"""The methods that a caller names, as instances by name."""

from ctgate.algorithms import AdaptiveAlgorithm, Algorithm, FixedStepAlgorithm


def methods_by_name(algs: object) -> dict[str, Algorithm]:
    """One method or several, classes or instances; a fixed-step class gets a dt that is never used.

    Raises: TypeError for what is no method; ValueError for none at all, or one named twice.
    """
    methods: dict[str, Algorithm] = {}
    for alg in algs if isinstance(algs, list | tuple) else [algs]:
        method = alg
        if isinstance(alg, type) and issubclass(alg, FixedStepAlgorithm):
            method = alg(dt=1.0)
        elif isinstance(alg, type) and issubclass(alg, AdaptiveAlgorithm):
            method = alg()
        if not isinstance(method, Algorithm):
            raise TypeError(f"algs has {alg!r}; it must be a method such as ct.Dopri5() or ct.RK4")
        name = type(method).__name__
        if name in methods:
            raise ValueError(f"algs has {name} twice; each method is measured once")
        methods[name] = method
    if not methods:
        raise ValueError("algs is empty; it must have at least one method")
    return methods


def fixed_step_methods(algs: object) -> dict[str, FixedStepAlgorithm]:
    """The same, of fixed-step methods only. Raises: TypeError for an adaptive one."""
    methods: dict[str, FixedStepAlgorithm] = {}
    for name, method in methods_by_name(algs).items():
        if not isinstance(method, FixedStepAlgorithm):
            raise TypeError(
                f"algs has {name}; it must be a fixed-step method such as ct.RK4. Adaptive methods have "
                "tolerances and no dt: use ct.convergence.work_precision"
            )
        methods[name] = method
    return methods

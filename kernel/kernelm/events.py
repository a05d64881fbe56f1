import sys

if __name__ == "__main__":
    import runpy
    runpy.run_module("kernelm_sdk.events", run_name="__main__", alter_sys=True)
else:
    import kernelm_sdk.events as m
    sys.modules[__name__] = m

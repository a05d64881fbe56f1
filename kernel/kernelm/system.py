import sys

if __name__ == "__main__":
    import runpy
    runpy.run_module("kernelm_sdk.system", run_name="__main__", alter_sys=True)
else:
    import kernelm_sdk.system as m
    sys.modules[__name__] = m

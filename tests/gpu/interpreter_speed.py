"""Triton's interpreter without the half of its time that it spends on patching its language again.

Every call of a device function looks through all members of triton.language for what it should replace, and finds that
its launch has replaced it all. ``install`` makes it look once per launch and module.
"""

from triton.runtime import interpreter


def install() -> None:
    """Patch the interpreter, for the life of the process. Versions of Triton that patch otherwise stay as they are."""
    patch_lang = interpreter._patch_lang
    if not hasattr(interpreter, "_LangPatchScope") or patch_lang.__name__ == "patch_once":
        return
    patched = set()  # ids of the globals of the functions that the launch in progress has patched the language for

    def patch_once(fn):
        if id(fn.__globals__) in patched:
            return interpreter._LangPatchScope()
        scope = patch_lang(fn)
        if not patched:  # the launch's own scope, which it restores at its end
            restore = scope.restore

            def restore_and_forget():
                patched.clear()
                restore()

            scope.restore = restore_and_forget
        patched.add(id(fn.__globals__))
        return scope

    interpreter._patch_lang = patch_once

"""Kernels are compiled once, found again, and used only if nobody else can have written them."""

import os
import pwd

import pytest
from processes import compiler_that_fails, compiler_that_remembers, loaded, run

from granet import native
from granet.native.cache import CacheRefused, refuse_foreign


def test_ready_never_compiles(tmp_path):
    code = "from granet import native; print(native.ready())"
    assert run(code, GRANET_CACHE=str(tmp_path))[:2] == (0, "False")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_explained(compiled, tmp_path):
    (tmp_path / "file").write_text("")
    code = "from granet import native; native.library()"
    status, _, err = run(code, GRANET_CACHE=str(tmp_path / "file" / "below"))
    assert status == 1
    assert "EngineUnavailable: the sparse kernels cannot be stored in" in err


def test_the_kernels_are_found_again(compiled):
    first = native.compile_into_cache()
    changed = first.stat().st_mtime_ns
    assert native.compile_into_cache() == first
    assert first.stat().st_mtime_ns == changed


def test_the_cache_folder_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("GRANET_CACHE", str(tmp_path))
    assert native.cache_dir() == tmp_path
    monkeypatch.delenv("GRANET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.cache_dir() == tmp_path / "granet"


def test_a_folder_of_the_users_own_is_used(cache):
    assert loaded(cache)[0] == "True True True"


@pytest.mark.parametrize("who", ["folder", "library", "digest"])
@pytest.mark.parametrize("how", ["owner", "mode"])
def test_kernels_that_others_can_have_written_are_refused(cache, who, how):
    """The name of a library can be computed, so one that somebody else has put there would be run."""
    (library,) = cache.glob("*.so")
    path = {"folder": cache, "library": library, "digest": library.with_suffix(".sha256")}[who]
    if how == "mode":
        path.chmod(0o777)
    elif os.geteuid() == 0:
        os.chown(path, 12345, 12345)
    else:
        pytest.skip("only root can give a file to another user")
    out, err = loaded(cache)
    assert out == "False False False"
    assert (
        "are not used: " in err and ("belongs to user 12345" if how == "owner" else "other users can write to") in err
    )
    assert "GRANET_CACHE" in err


def test_a_link_to_another_library_and_a_folder_in_an_open_one_are_refused(cache, tmp_path):
    (library,) = cache.glob("*.so")
    library.rename(tmp_path / "planted.so")
    library.symlink_to(tmp_path / "planted.so")
    assert "it is a symbolic link" in loaded(cache)[1]
    library.unlink()
    (tmp_path / "planted.so").rename(library)
    tmp_path.chmod(0o777)
    assert f"other users can write to {tmp_path}" in loaded(cache)[1]
    tmp_path.chmod(0o1777)  # as /tmp
    assert loaded(cache)[0] == "True True True"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_below_somebody_elses_is_refused(tmp_path):
    """Who owns the folder above can put another one in its place, a sticky one too."""
    folder = tmp_path / "theirs" / "mine"
    folder.mkdir(parents=True)
    refuse_foreign(folder)
    for mode in (0o755, 0o1777):
        os.chown(folder.parent, 12345, 12345)
        folder.parent.chmod(mode)
        with pytest.raises(CacheRefused, match=f"{folder.parent} belongs to user 12345, not to you"):
            refuse_foreign(folder)


def test_the_group_that_a_user_has_alone_may_write(tmp_path):
    """Most systems give each user a group of the same name and the umask 002; other groups have other members."""
    user = pwd.getpwuid(os.geteuid())
    tmp_path.chmod(0o775)
    os.chown(tmp_path, -1, user.pw_gid)
    refuse_foreign(tmp_path)
    if os.geteuid() == 0:
        os.chown(tmp_path, -1, 12345)
        with pytest.raises(CacheRefused, match="other users can write"):
            refuse_foreign(tmp_path)


def test_what_is_compiled_belongs_to_the_user_alone(compiled, tmp_path):
    folder = tmp_path / "new" / "cache"
    (library,) = compiled.glob("*.so")
    old = os.umask(0o002)
    try:
        assert loaded(folder, CXX=compiler_that_remembers(tmp_path, library))[0] == "False True True"
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o700 and folder.stat().st_uid == os.geteuid()
    assert {path.suffix: path.stat().st_mode & 0o077 for path in folder.glob("*.s*")} == {".so": 0, ".sha256": 0}


@pytest.mark.parametrize("left", [0, 5000])
def test_a_damaged_library_is_compiled_again(compiled, cache, left, tmp_path):
    """Loading one that is cut off ends in SIGBUS."""
    (library,) = cache.glob("*.so")
    library.write_bytes(library.read_bytes()[:left])
    out, err = loaded(cache, CXX=compiler_that_remembers(tmp_path, compiled / library.name))
    assert out == "False True True" and err.count("are damaged and are compiled again") == 1
    assert library.read_bytes() == (compiled / library.name).read_bytes()


def test_compiled_kernels_need_no_compiler(cache, tmp_path):
    assert loaded(cache, PATH=str(tmp_path), CXX="")[0] == "True True True"
    assert loaded(cache, CXX="/bin/false")[0] == "True True True"


def test_a_cxx_that_is_no_compiler_is_said(tmp_path):
    for name, why in (("/bin/false", "is not a C++ compiler"), ("no-such-compiler", "cannot be found")):
        out, err = loaded(tmp_path / "empty", CXX=name)
        assert out == "False False False" and why in err and name in err
    status, _, err = run(
        "from granet import native; native.load()", CXX="/bin/false", GRANET_CACHE=str(tmp_path / "empty")
    )
    assert status == 1 and "EngineUnavailable: /bin/false is not a C++ compiler" in err


def test_a_compiler_that_fails_is_named(tmp_path):
    out, err = loaded(tmp_path / "cache", CXX=compiler_that_fails(tmp_path))
    assert out == "False False False" and "broken" in err and "out of luck" in err
    assert not list((tmp_path / "cache").glob("*.so"))


@pytest.mark.slow
def test_a_damaged_library_is_compiled_by_the_compiler_of_this_machine(cache):
    (library,) = cache.glob("*.so")
    size = library.stat().st_size
    library.write_bytes(b"")
    assert loaded(cache)[0] == "False True True"
    assert library.stat().st_size == size

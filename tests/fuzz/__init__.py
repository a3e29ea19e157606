"""A seeded fuzzer of everything that reads untrusted bytes, and of the C++ kernels. See CONTRIBUTING.md, "Fuzzing"."""

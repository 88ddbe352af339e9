// Schemas of every op, and the Python module that loads them. Implementations register themselves in cpu/ and cuda/.
#include <Python.h>
#include <torch/csrc/stable/library.h>

// Legend: N heads (batch x KV heads), R rows of a flat buffer, T widest head, G query heads of a KV head, Q queries.
STABLE_TORCH_LIBRARY(asymkv, m) {
  m.def(
      "ragged_append_(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) cardinality, Tensor(d!) log_n, "
      "Tensor(e!) position, Tensor(f!) length, Tensor start, Tensor capacity, Tensor new_keys, Tensor new_values, "
      "Tensor new_position, Tensor? new_cardinality=None, Tensor? counts=None) -> ()");
  m.def("compaction_layout(Tensor destination, Tensor length) -> (Tensor order, Tensor offset, Tensor count)");
  m.def(
      "ragged_compact(Tensor keys, Tensor values, Tensor cardinality, Tensor position, Tensor rotary, "
      "Tensor[] statistics, Tensor? key_weight, Tensor order, Tensor offset, Tensor inv_freq, "
      "Tensor? target_rotary, Tensor out_start, Tensor(a!) out_keys, Tensor(b!) out_values, "
      "Tensor(c!) out_cardinality, Tensor(d!) out_log_n, Tensor(e!) out_position, "
      "Tensor(f!)[] out_statistics) -> ()");
  m.def(
      "lma_decode(Tensor query, Tensor keys, Tensor values, Tensor? log_n, Tensor start, Tensor length, "
      "float scale, Tensor? position=None, Tensor? query_position=None) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_mass(Tensor query, Tensor keys, Tensor log_n, Tensor position, Tensor query_position, Tensor lse, "
      "float scale) -> Tensor");
  m.def(
      "key_curvature(Tensor query, Tensor keys, Tensor values, Tensor log_n, Tensor position, "
      "Tensor query_position, Tensor lse, Tensor out, float scale) -> (Tensor square, Tensor product)");
}

// `import asymkv._C` runs the registrations above; the module itself is empty.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

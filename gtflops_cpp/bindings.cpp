// gtflops._core: arrays in, arrays out. Inputs are copied before the GIL is released, so that no other thread
// can change what was checked.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "gtflops/chain_knapsack.hpp"
#include "gtflops/closure.hpp"
#include "gtflops/graph_knapsack.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <typename T, std::size_t dimensions>
using Array = nb::ndarray<const T, nb::ndim<dimensions>, nb::device::cpu>;

template <typename Stored, typename T>
std::vector<Stored> copied(const Array<T, 1>& array) {
    std::vector<Stored> result(array.size());
    const auto view = array.view();
    for (std::size_t i = 0; i < result.size(); ++i) result[i] = view(i);
    return result;
}

template <typename Stored, typename T>
std::vector<Stored> copied(const Array<T, 2>& array) {
    std::vector<Stored> result(array.size());
    const auto view = array.view();
    auto next = result.begin();
    for (std::size_t i = 0; i < array.shape(0); ++i) {
        for (std::size_t j = 0; j < array.shape(1); ++j) *next++ = view(i, j);
    }
    return result;
}

template <typename T, typename Stored>
nb::object to_numpy(std::vector<Stored> values, std::initializer_list<std::size_t> shape) {
    static_assert(sizeof(T) == sizeof(Stored));
    auto owned = std::make_unique<std::vector<Stored>>(std::move(values));
    const nb::capsule owner(
        owned.get(), [](void* pointer) noexcept { delete static_cast<std::vector<Stored>*>(pointer); });
    return nb::cast(nb::ndarray<nb::numpy, T>(owned.release()->data(), shape, owner));
}

/// Solves without the GIL; Ctrl-C raises what its handler does, KeyboardInterrupt as a rule.
template <typename Solve>
nb::tuple solved(std::size_t max_states, Solve solve) {
    const gtflops::SolveOptions options{max_states, [] {
                                            const nb::gil_scoped_acquire gil;
                                            return PyErr_CheckSignals() != 0;
                                        }};
    gtflops::Solution solution = [&] {
        try {
            const nb::gil_scoped_release released;
            return solve(options);
        } catch (const gtflops::Interrupted&) {
            throw nb::python_error();
        }
    }();
    const std::size_t size = solution.mask.size();
    return nb::make_tuple(to_numpy<bool>(std::move(solution.mask), {size}), solution.value, solution.cost,
                          solution.upper_bound, solution.optimal);
}

nb::tuple solve_chain(const Array<std::int64_t, 1>& dw, const Array<std::int64_t, 1>& dy,
                      const Array<double, 1>& importance, std::int64_t capacity, std::size_t max_states) {
    const auto own_dw = copied<std::int64_t>(dw);
    const auto own_dy = copied<std::int64_t>(dy);
    const auto own_importance = copied<double>(importance);
    return solved(max_states, [&](const gtflops::SolveOptions& options) {
        return gtflops::solve_chain({own_dw, own_dy, own_importance, capacity}, options);
    });
}

std::vector<std::int64_t> costs(const gtflops::ClosureCosts& closure, const std::vector<std::uint8_t>& masks,
                                std::size_t num_selections) {
    const nb::gil_scoped_release released;
    return closure.costs(masks, num_selections);
}

}  // namespace

NB_MODULE(_core, module) {
    nb::set_leak_warnings(false);  // objects that a module's globals still hold when Python exits are no leak
    nb::class_<gtflops::ClosureCosts>(module, "ClosureCosts")
        .def(
            "__init__",
            [](gtflops::ClosureCosts* self, const Array<std::int64_t, 1>& dependency_offsets,
               const Array<std::int64_t, 1>& dependencies, const Array<std::int64_t, 1>& tensor_offsets,
               const Array<std::int64_t, 1>& tensor_segments, const Array<std::int64_t, 2>& costs) {
                const auto own_dependency_offsets = copied<std::int64_t>(dependency_offsets);
                const auto own_dependencies = copied<std::int64_t>(dependencies);
                const auto own_tensor_offsets = copied<std::int64_t>(tensor_offsets);
                const auto own_tensor_segments = copied<std::int64_t>(tensor_segments);
                const auto own_costs = copied<std::int64_t>(costs);
                const std::size_t num_columns = costs.shape(0);
                const nb::gil_scoped_release released;
                new (self)
                    gtflops::ClosureCosts({own_dependency_offsets, own_dependencies},
                                          {own_tensor_offsets, own_tensor_segments}, own_costs, num_columns);
            },
            "dependency_offsets"_a.noconvert(), "dependencies"_a.noconvert(), "tensor_offsets"_a.noconvert(),
            "tensor_segments"_a.noconvert(), "costs"_a.noconvert())
        .def_prop_ro("num_segments", &gtflops::ClosureCosts::num_segments)
        .def_prop_ro("num_tensors", &gtflops::ClosureCosts::num_tensors)
        .def_prop_ro("num_columns", &gtflops::ClosureCosts::num_columns)
        .def(
            "cost",
            [](const gtflops::ClosureCosts& self, const Array<bool, 1>& mask) {
                return to_numpy<std::int64_t>(costs(self, copied<std::uint8_t>(mask), 1),
                                              {self.num_columns()});
            },
            "mask"_a.noconvert())
        .def(
            "costs",
            [](const gtflops::ClosureCosts& self, const Array<bool, 2>& masks) {
                if (masks.shape(1) != self.num_tensors()) {
                    const std::string shape =
                        std::to_string(masks.shape(0)) + ", " + std::to_string(masks.shape(1));
                    throw std::invalid_argument("masks has shape [" + shape +
                                                "]; expected one column a tensor, " +
                                                std::to_string(self.num_tensors()));
                }
                const std::size_t n = masks.shape(0);
                return to_numpy<std::int64_t>(costs(self, copied<std::uint8_t>(masks), n),
                                              {n, self.num_columns()});
            },
            "masks"_a.noconvert())
        .def(
            "reached",
            [](const gtflops::ClosureCosts& self, const Array<bool, 1>& mask) {
                const auto own_mask = copied<std::uint8_t>(mask);
                std::vector<std::uint8_t> reached;
                {
                    const nb::gil_scoped_release released;
                    reached = self.reached(own_mask);
                }
                return to_numpy<bool>(std::move(reached), {self.num_segments()});
            },
            "mask"_a.noconvert());

    nb::class_<gtflops::GraphKnapsack>(module, "GraphKnapsack")
        .def(
            "__init__",
            [](gtflops::GraphKnapsack* self, const Array<std::int64_t, 1>& dependency_offsets,
               const Array<std::int64_t, 1>& dependencies, const Array<std::int64_t, 1>& tensor_offsets,
               const Array<std::int64_t, 1>& tensor_segments, const Array<std::int64_t, 1>& costs) {
                const auto own_dependency_offsets = copied<std::int64_t>(dependency_offsets);
                const auto own_dependencies = copied<std::int64_t>(dependencies);
                const auto own_tensor_offsets = copied<std::int64_t>(tensor_offsets);
                const auto own_tensor_segments = copied<std::int64_t>(tensor_segments);
                const auto own_costs = copied<std::int64_t>(costs);
                const nb::gil_scoped_release released;
                new (self) gtflops::GraphKnapsack({own_dependency_offsets, own_dependencies},
                                                  {own_tensor_offsets, own_tensor_segments}, own_costs);
            },
            "dependency_offsets"_a.noconvert(), "dependencies"_a.noconvert(), "tensor_offsets"_a.noconvert(),
            "tensor_segments"_a.noconvert(), "costs"_a.noconvert())
        .def_prop_ro("num_segments", &gtflops::GraphKnapsack::num_segments)
        .def_prop_ro("num_tensors", &gtflops::GraphKnapsack::num_tensors)
        .def(
            "solve",
            [](const gtflops::GraphKnapsack& self, const Array<double, 1>& importance, std::int64_t capacity,
               std::size_t max_states) {
                const auto own_importance = copied<double>(importance);
                return solved(max_states, [&](const gtflops::SolveOptions& options) {
                    return self.solve(own_importance, capacity, options);
                });
            },
            "importance"_a.noconvert(), "capacity"_a, "max_states"_a);

    module.def("solve_chain", &solve_chain, "dw"_a.noconvert(), "dy"_a.noconvert(),
               "importance"_a.noconvert(), "capacity"_a, "max_states"_a);
}

// Unverified: no Mac runs edgetune's tests.

import CoreML
import Foundation

/// Reads adapter.safetensors: 8 bytes with the length of the header, a JSON header, then the fp16 tensors.
struct AdapterFile {
    private let tensors: [String: (shape: [Int], bytes: Range<Int>)]
    private let data: Data
    let base: String

    init(at url: URL) throws {
        data = try Data(contentsOf: url, options: .mappedIfSafe)
        let damaged = ModelFailure("\(url.lastPathComponent) is no adapter file; export it again.")
        guard data.count >= 8 else { throw damaged }
        let length = data.withUnsafeBytes { UInt64(littleEndian: $0.loadUnaligned(as: UInt64.self)) }
        guard length <= UInt64(data.count - 8), let start = Int(exactly: length + 8) else { throw damaged }
        let header = try JSONSerialization.jsonObject(with: data.subdata(in: 8..<start))
        guard let entries = header as? [String: [String: Any]] else { throw damaged }
        base = entries["__metadata__"]?["base"] as? String ?? ""
        var found: [String: (shape: [Int], bytes: Range<Int>)] = [:]
        for (name, entry) in entries where name != "__metadata__" {
            guard
                entry["dtype"] as? String == "F16",
                let shape = entry["shape"] as? [Int], shape.count == 3,
                let offsets = entry["data_offsets"] as? [Int], offsets.count == 2,
                shape.allSatisfy({ $0 > 0 && $0 < 1 << 20 }),  // so that their product fits an Int
                offsets[0] >= 0, offsets[0] <= offsets[1], offsets[1] <= data.count - start,
                offsets[1] - offsets[0] == 2 * shape.reduce(1, *)
            else { throw damaged }
            found[name] = (shape, start + offsets[0]..<start + offsets[1])
        }
        tensors = found
    }

    /// Returns the inputs for a package, padded with zeros to its rank. Throws if the adapter has another base or a higher rank.
    func inputs(for call: HowToCall) throws -> [String: MLFeatureValue] {
        guard let wanted = call.adapter?.inputs, base == call.base, Set(wanted.keys) == Set(tensors.keys) else {
            throw ModelFailure("This adapter was trained on another model; export it again.")
        }
        var values: [String: MLFeatureValue] = [:]
        for (name, shape) in wanted {
            values[name] = MLFeatureValue(multiArray: MLMultiArray(try padded(name, to: shape)))
        }
        return values
    }

    private func padded(_ name: String, to shape: [Int]) throws -> MLShapedArray<Float16> {
        guard let (own, bytes) = tensors[name], own[0] == shape[0], own[1] <= shape[1], own[2] <= shape[2] else {
            throw ModelFailure("This adapter's rank is higher than the model was exported for; export the model again.")
        }
        var scalars = [Float16](repeating: 0, count: shape.reduce(1, *))
        data.withUnsafeBytes { raw in
            for layer in 0..<own[0] {
                for row in 0..<own[1] {
                    let source = bytes.lowerBound + 2 * (layer * own[1] + row) * own[2]
                    let target = (layer * shape[1] + row) * shape[2]
                    for column in 0..<own[2] {
                        let bits = raw.loadUnaligned(fromByteOffset: source + 2 * column, as: UInt16.self)
                        scalars[target + column] = Float16(bitPattern: UInt16(littleEndian: bits))
                    }
                }
            }
        }
        return MLShapedArray(scalars: scalars, shape: shape)
    }
}
